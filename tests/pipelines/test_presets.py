import pytest

from infra.errors import ConfigError
from infra.settings import setting_names
from pipelines.artifacts import Store
from pipelines.config import ExperimentConfig
from pipelines.experiments import EXPERIMENTS
from pipelines.experiments.demo import demo
from pipelines.graph import plan
from pipelines.presets import PRESETS, apply_preset
from pipelines.stages import STAGES


def fingerprints(config, tmp_path):
    return [item.fingerprint for item in plan(STAGES, config, "demo", Store(tmp_path / "store"))]


PLAIN = [name for name, make in EXPERIMENTS.items() if isinstance(make(), ExperimentConfig)]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_every_experiment_that_compares_nothing(name, preset):
    config = EXPERIMENTS[name]()
    changed = apply_preset(config, {"preset": preset})
    assert changed.preset == preset
    assert changed.dataset == config.dataset
    for dotted, value in PRESETS[preset].items():
        section, *names = dotted.split(".")
        found = getattr(changed, section)
        for part in names:
            found = getattr(found, part)
        assert found == value, dotted


def test_presets_name_settings_of_network_and_training_only():
    names = setting_names(demo())
    dotted = {name for preset in PRESETS.values() for name in preset}
    assert dotted <= set(names)
    assert {name.split(".")[0] for name in dotted} == {"model", "train"}
    assert set(PRESETS) == set(ExperimentConfig.model_fields["preset"].annotation.__args__)


def test_other_settings_come_after_the_preset_in_whatever_order():
    for overrides in ({"preset": "paper", "train.epochs": 3}, {"train.epochs": 3, "preset": "paper"}):
        config = apply_preset(demo(), overrides)
        assert (config.train.epochs, config.train.batch_size, config.model.scope) == (3, 12, "joint")
    assert apply_preset(demo(), {"train.epochs": 20}).preset == "fixed"
    assert apply_preset(apply_preset(demo(), {"preset": "gsm"}), {"train.epochs": 20}).train.accumulation == 2


def test_the_default_preset_leaves_an_experiment_as_it_is():
    assert apply_preset(demo(), {"preset": "fixed"}) == demo()


def test_fingerprints_depend_on_what_comes_out_and_not_on_the_name(tmp_path):
    for preset in PRESETS:
        named = apply_preset(demo(), {"preset": preset})
        by_hand = apply_preset(demo(), PRESETS[preset])
        assert by_hand.preset == "fixed"
        assert fingerprints(named, tmp_path) == fingerprints(by_hand, tmp_path)
    assert fingerprints(apply_preset(demo(), {"preset": "paper"}), tmp_path) != fingerprints(demo(), tmp_path)


def test_the_seed_code_has_what_the_notes_list():
    train = apply_preset(demo(), {"preset": "seed_code"}).train
    compat = train.compat
    assert all(
        [compat.freeze_gamma, compat.ignore_multipliers, compat.clip_each_micro_batch, compat.lr_by_epoch, compat.logged_loss]
    )
    assert (compat.val_protocol, train.subset, train.flip, train.validate_every_epochs) == ("seed_code", 40_000, "naive", 2)
    assert (train.epochs, train.batch_size, train.accumulation, train.schedule) == (15, 12, 2, "warmup_cosine")


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'seedcode' is not a preset; did you mean seed_code"):
        apply_preset(demo(), {"preset": "seedcode"})
