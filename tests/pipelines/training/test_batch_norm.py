import pytest
import torch
from torch import nn

from infra.errors import ConfigError
from models import create_model
from pipelines.training.batch_norm import frozen_norms, measure_statistics, prepare_norms, set_training_mode

CPU = torch.device("cpu")


def norms_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def test_partial_leaves_the_first_norm_and_those_of_gates():
    model = create_model("gsm_bn_inception", num_classes=3, num_segments=2)
    prepare_norms(model, "partial", CPU)
    set_training_mode(model, "partial")
    alive = [name for name in norms_of(model) if model.get_submodule(name).training]
    assert alive[0] == norms_of(model)[0]
    assert len(alive) == 11
    assert all(name.startswith("base_model.gsm_inception_") for name in alive[1:])
    assert [name for name in norms_of(model) if model.get_submodule(name).weight.requires_grad] == alive
    assert model.dropout.training


def test_frozen_norms_change_nothing_and_train_changes_all(tiny, tmp_path):
    before = tiny.make_tiny_net().norm.state_dict()
    for kind in ("frozen", "train"):
        model = tiny.make_tiny_net()
        tiny.train_tiny(None, model, settings={"batch_norm": kind})
        same = {name: torch.equal(tensor, before[name]) for name, tensor in model.norm.state_dict().items()}
        assert set(same.values()) == {kind == "frozen"}, same
    assert frozen_norms(model, "train") == []


def test_norms_over_all_ranks_need_gpus(tiny):
    with pytest.raises(ConfigError, match=r"train\.batch_norm=sync works on GPUs only, and this worker computes on cpu"):
        tiny.train_tiny(None, settings={"batch_norm": "sync"})


def test_precise_statistics_are_the_means_over_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    batches = list(torch.randn(3, 5, 3, 6, 6))
    with torch.no_grad():
        maps = [model[0](batch) for batch in batches]
    measure_statistics(model, iter(batches), "fp32", CPU)
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var((0, 2, 3)) for x in maps]).mean(0))
    assert model[1].momentum == 0.1
