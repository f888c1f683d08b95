import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ClusterError, ConfigError
from tuning.capacity import count_trials, plan_concurrency, trial_bundle
from tuning.settings import SearchSettings

NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 9), "GPU": st.integers(0, 3)}), min_size=1, max_size=4)
ASKED = st.fixed_dictionaries(
    {
        "workers_per_trial": st.integers(1, 4),
        "cpus_per_trial": st.integers(1, 4),
        "gpus_per_trial": st.sampled_from([0.0, 1.0]),
        "max_concurrent_trials": st.integers(0, 3),
    }
)


def place(nodes, bundle):
    """Take a bundle from the first node that has it; say whether there was one."""
    for node in nodes:
        if all(node[name] >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] -= amount
            return True
    return False


@given(asked=ASKED, nodes=NODES)
def test_as_many_trials_run_at_once_as_can_all_have_their_workers(asked, nodes):
    """Whichever worker is placed first: bundles are equal, so that none is in the way of another."""
    settings = SearchSettings(**asked)
    bundle = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}
    num_fitting = count_trials(settings, nodes)
    left = [dict(node) for node in nodes]
    assert all(place(left, bundle) for _ in range(num_fitting * settings.workers_per_trial))
    assert not all(place(left, bundle) for _ in range(settings.workers_per_trial)), "one more trial would have fitted"
    if num_fitting == 0:
        with pytest.raises(ClusterError, match=rf"a trial asks for .*{settings.cpus_per_trial} CPUs and"):
            plan_concurrency(settings, nodes)
    else:
        assert plan_concurrency(settings, nodes) == min(num_fitting, settings.max_concurrent_trials or num_fitting)


@given(asked=ASKED, nodes=NODES)
def test_what_does_not_fit_is_told_which_setting_to_lower_and_then_fits(asked, nodes):
    """Following the advice again and again ends with a trial that fits, or with a cluster without any CPU."""
    settings = SearchSettings(**asked)
    for _ in range(4):
        if count_trials(settings, nodes):
            return
        with pytest.raises(ClusterError) as caught:
            plan_concurrency(settings, nodes)
        if str(caught.value).endswith(("add a node with CPUs", "lower search.cpus_per_trial or search.gpus_per_trial")):
            return
        words = str(caught.value).rsplit("; lower search.", 1)
        name, _, value = words[1].partition(",")[0].partition(" to ")
        assert float(value) < getattr(settings, name)
        settings = settings.model_copy(update={name: float(value) if name == "gpus_per_trial" else int(value)})
    raise AssertionError("the advice leads nowhere")


def test_trials_that_share_gpus_and_workers_that_may_not():
    third = SearchSettings(gpus_per_trial=1 / 3)
    assert count_trials(third, [{"CPU": 16, "GPU": 2}, {"CPU": 4}]) == 6
    with pytest.raises(ConfigError, match=r"gpus_per_trial is 0\.5 with search\.workers_per_trial 2; expected 0 or 1"):
        plan_concurrency(SearchSettings(gpus_per_trial=0.5, workers_per_trial=2), [{"CPU": 16, "GPU": 2}])


def test_a_trial_with_workers_reserves_no_cpu_itself():
    """Else trials that wait for their workers would hold the CPUs that those wait for."""
    assert "CPU" not in trial_bundle(SearchSettings(workers_per_trial=2))
    assert trial_bundle(SearchSettings(cpus_per_trial=2, gpus_per_trial=0.5)) == {"CPU": 2, "GPU": 0.5}
