import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from infra.errors import ConfigError, PipelineError
from models import create_model
from pipelines.training.run import set_up

CPU = torch.device("cpu")


def run_of(tiny, model=None, **changes):
    return set_up(model or tiny.make_tiny_net(), tiny.MemoryLoader(), tiny.tiny_settings(**changes), CPU, None, {"data": 1})


def test_what_changes_no_number_is_not_part_of_the_identity(tiny):
    first = run_of(tiny).identity
    assert first["data"] == 1
    assert run_of(tiny, num_workers=3, loader_threads=1, max_failures=0, checkpoint_every_steps=2).identity == first
    for changes in ({"batch_size": 2}, {"accumulation": 2}, {"ema_decay": 0.5}, {"compat": {"lr_by_epoch": True}}):
        assert run_of(tiny, **changes).identity != first


def test_what_is_validated_is_the_average_if_there_is_one(tiny):
    run = run_of(tiny)
    assert run.evaluated is run.state.model
    run = run_of(tiny, ema_decay=0.5)
    assert run.evaluated is run.state.average.module
    assert run.steps_per_epoch == 5


def test_the_average_is_the_exponential_one(tiny):
    run = run_of(tiny, ema_decay=0.75)
    for value in (1.0, 2.0, 4.0):
        run.state.model.gamma.data.fill_(value)
        run.state.average.update_parameters(run.state.model)
    assert run.evaluated.gamma.item() == 0.75 * (0.75 * 1.0 + 0.25 * 2.0) + 0.25 * 4.0


def test_mixed_clips_and_labels_are_means_of_two(tiny):
    run = run_of(tiny, mixup_alpha=1.0)
    clips, labels = torch.rand(3, 2, 3, 4, 4), torch.tensor([0, 1, 2])
    torch.manual_seed(1)
    mixed, targets = run.mix(tv_tensors.Video(clips), labels)
    share = targets[0, 0].item()
    assert 0 < share < 1
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(mixed.as_subclass(Tensor), share * clips + (1 - share) * clips.roll(1, 0))
    assert run_of(tiny).mix is None


def test_gamma_is_frozen_on_request_with_the_attention_that_it_switches_off(tiny):
    model = create_model("sa_gsm_bn_inception", num_classes=3, num_segments=2, placement="3a,4e", scope="divided")
    model.base_model.gsm_inception_4e_3x3_reduce.attn.gamma.data.fill_(0.5)
    run = run_of(tiny, model, compat={"freeze_gamma": True})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.endswith("gamma") for name in trained)
    attention = {name for name in trained if ".attn." in name}
    assert attention
    assert all("4e" in name and ".attn.temporal." not in name for name in attention)
    assert "gamma" not in {group["role"] for group in run.state.optimizer.param_groups}


def test_multipliers_are_ignored_on_request(tiny):
    groups = run_of(tiny, compat={"ignore_multipliers": True}, weight_decay=0.25).state.optimizer.param_groups
    assert {(group["multiplier"], group["weight_decay"]) for group in groups} == {(1.0, 0.25)}
    groups = run_of(tiny, weight_decay=0.25).state.optimizer.param_groups
    assert {group["role"]: (group["multiplier"], group["weight_decay"]) for group in groups}["bias"] == (2.0, 0.0)


def test_a_tensor_without_a_group_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("pipelines.training.optim.parameter_roles", lambda model: {"weight": ["conv.weight"]})
    with pytest.raises(PipelineError, match=r"gamma, .*\(in no group\)"):
        run_of(tiny)


def test_random_placements_need_attention(tiny):
    with pytest.raises(ConfigError, match=r"train\.random_placement needs a network with attention, .* model\.placement=all"):
        run_of(tiny, create_model("gsm_resnet18", num_classes=3, num_segments=2), random_placement=True)
    with pytest.raises(ValueError, match="random_placement does not go with compile, which would compile each placement anew"):
        tiny.tiny_settings(random_placement=True, compile=True)
    with pytest.raises(ValueError, match=r"random_placement does not go with compat\.freeze_gamma"):
        tiny.tiny_settings(random_placement=True, compat={"freeze_gamma": True})
