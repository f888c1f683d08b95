import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from infra.errors import ConfigError, PipelineError
from models import create_model, list_models
from pipelines.experiments.something_v1 import something_v1
from pipelines.presets import apply_preset
from pipelines.training.optim import build_optimizer, check_groups, learning_rate_at, set_learning_rate
from pipelines.training.settings import ModelSettings, TrainSettings, build_model

PUBLISHED = [0.001, 0.0019, 0.0028, 0.0037, 0.0046, 0.0055, 0.0064, 0.0073, 0.0082, 0.0091, 0.01, 0.009045, 0.006545]
PUBLISHED += [0.003455, 0.000955]  # PAPER_NOTES.md, "learning rate by epoch"


@pytest.mark.parametrize("name", list_models())
def test_every_trainable_tensor_is_in_one_group_with_its_rate_and_decay(name):
    model = create_model(name, num_classes=4, num_segments=2)
    optimizer = build_optimizer(model, TrainSettings(learning_rate=0.1, weight_decay=0.25, gamma_multiplier=3.0))
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped}) == len(list(model.parameters()))
    found = {group["role"]: (round(group["lr"], 9), group["weight_decay"]) for group in optimizer.param_groups}
    expected = {"weight": (0.1, 0.25), "bias": (0.2, 0), "norm": (0.1, 0), "gate": (0.1, 0.25), "gamma": (0.3, 0)}
    assert found == {role: expected[role] for role in found}
    norm = set() if name == "c3d" else {"norm"}  # C3D is older than batch norm
    assert set(found) == {"weight", "bias"} | norm | ({"gate"} if "gsm" in name else set()) | (
        {"gamma"} if "sa_" in name else set()
    )


def test_a_frozen_gamma_needs_no_group():
    model = create_model("sa_gsm_bn_inception", num_classes=4, num_segments=2, placement="3a")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("gamma"))
    assert "gamma" not in {group["role"] for group in build_optimizer(model, TrainSettings()).param_groups}


def test_tensors_in_no_group_or_in_two_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[0].bias.requires_grad_(False)
    groups = {"weight": ["0.weight", "1.weight"], "other": ["1.weight", "0.bias"]}
    with pytest.raises(PipelineError) as error:
        check_groups(model, groups)
    message = str(error.value)
    assert "1.bias (in no group)" in message
    assert "1.weight (in several groups)" in message
    assert "0.bias (in a group but not trainable)" in message
    assert "models.parameter_roles" in message
    check_groups(model, {"weight": ["0.weight", "1.weight"], "bias": ["1.bias"]})


def test_the_schedule_by_epoch_is_the_published_one():
    settings = TrainSettings(epochs=15, warmup_epochs=10, learning_rate=0.01)
    assert [learning_rate_at(epoch, 1, settings) for epoch in range(15)] == pytest.approx(PUBLISHED, abs=5e-7)
    assert learning_rate_at(15, 1, settings) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 1667])
def test_by_epoch_every_step_of_an_epoch_has_the_published_rate(steps_per_epoch):
    settings = apply_preset(something_v1(), {"preset": "seed_code"}).train
    assert settings.epochs == 15
    for epoch, published in enumerate(PUBLISHED):
        for step in (0, steps_per_epoch // 2, steps_per_epoch - 1):
            assert learning_rate_at(epoch * steps_per_epoch + step, steps_per_epoch, settings) == pytest.approx(
                published, abs=5e-7
            )


@given(
    period=st.floats(0.1, 5),
    growth=st.floats(1, 3),
    warmup=st.floats(0, 2),
    place=st.floats(0, 1, exclude_max=True),
    number=st.integers(0, 4),
)
def test_sgdr_starts_again_at_the_peak_and_each_period_is_longer(period, growth, warmup, place, number):
    """Loshchilov and Hutter, equation 5."""
    settings = TrainSettings(
        epochs=1000, learning_rate=0.5, schedule="sgdr", warmup_epochs=warmup, sgdr_period_epochs=period, sgdr_growth=growth
    )
    start = warmup + sum(period * growth**i for i in range(number))
    length = period * growth**number
    step = round(1e6 * (start + place * length))
    expected = 0.25 * (1 + math.cos(math.pi * (step / 1e6 - start) / length))
    found = learning_rate_at(step, 10**6, settings)
    near_a_start = min(place, 1 - place) * length < 1e-5
    assert near_a_start or found == pytest.approx(expected, abs=1e-5)


def test_sgdr_in_numbers():
    settings = TrainSettings(
        epochs=15, learning_rate=0.01, schedule="sgdr", warmup_epochs=0, sgdr_period_epochs=5, sgdr_growth=2
    )
    rates = [learning_rate_at(epoch, 1, settings) for epoch in range(15)]
    assert [epoch for epoch, rate in enumerate(rates) if rate == 0.01] == [0, 5]
    assert learning_rate_at(49, 10, settings) < 1.1e-5
    assert learning_rate_at(149, 10, settings) < 1e-5
    assert rates[10] == pytest.approx(0.005)


@given(epochs=st.integers(1, 30), warmup=st.floats(0, 0.99), steps_per_epoch=st.integers(1, 50))
def test_the_schedule_rises_to_the_peak_then_falls_to_zero(epochs, warmup, steps_per_epoch):
    settings = TrainSettings(epochs=epochs, warmup_epochs=warmup * epochs, learning_rate=0.5)
    rates = [learning_rate_at(step, steps_per_epoch, settings) for step in range(epochs * steps_per_epoch + 1)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert max(rates) <= 0.5 * (1 + 1e-12)


def test_multipliers_stay_when_the_rate_changes():
    optimizer = build_optimizer(nn.Linear(2, 3), TrainSettings(bias_multiplier=4.0))
    set_learning_rate(optimizer, 0.5)
    assert {group["role"]: group["lr"] for group in optimizer.param_groups} == {"weight": 0.5, "bias": 2.0}


def test_a_warmup_that_does_not_end_is_refused():
    with pytest.raises(ValidationError, match=r"warmup_epochs is 10, but training has 5 epochs"):
        TrainSettings(epochs=5)


def test_equal_placements_are_equal_settings_and_wrong_ones_are_refused():
    assert ModelSettings(placement="4e+3a") == ModelSettings(placement=129) == ModelSettings(placement="3a,4e")
    with pytest.raises(ValidationError, match=r"placement[\s\S]*'3z' is not a slot"):
        ModelSettings(placement="3z")
    with pytest.raises(ValidationError, match=r"name[\s\S]*there is no network named 'gsm_inception'"):
        ModelSettings(name="gsm_inception")


def test_what_a_network_cannot_do_is_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        model = build_model(ModelSettings(name="tsn_bn_inception", placement="3a", dropout=0.25), 4, 2)
    assert model.dropout.p == 0.25
    assert "model.placement=3a is ignored: tsn_bn_inception has no such option" in caplog.text
    assert "starts from random weights" in caplog.text
    assert "model.scope" not in caplog.text
    with pytest.raises(ConfigError, match=r"model\.weights=.*gone\.pth cannot be used"):
        build_model(ModelSettings(weights=tmp_path / "gone.pth"), 4, 2)


def test_published_weights_are_loaded(tmp_path, caplog):
    torch.manual_seed(1)
    source = create_model("tsn_bn_inception", num_classes=4, num_segments=2)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth.tar")
    with caplog.at_level("INFO"):
        model = build_model(ModelSettings(name="tsn_bn_inception", weights=tmp_path / "weights.pth.tar"), 4, 2)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert "starts from the weights in" in caplog.text


def test_published_weights_take_the_order_of_the_datasets_classes(tmp_path):
    source = create_model("tsn_resnet18", num_classes=3, num_segments=2)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("up\ndown\naside\n")
    settings = ModelSettings(name="tsn_resnet18", weights=tmp_path / "weights.pth", weights_labels=tmp_path / "labels.txt")
    model = build_model(settings, 3, 2, label_names=["aside", "down", "up"])
    assert torch.equal(model.new_fc.weight, source.new_fc.weight[[2, 1, 0]])
    with pytest.raises(ConfigError, match="trained with other labels; it has no class for: 'left'"):
        build_model(settings, 3, 2, label_names=["left", "down", "up"])
    (tmp_path / "labels.txt").unlink()
    with pytest.raises(ConfigError, match=r"labels\.txt"):
        build_model(settings, 3, 2, label_names=["aside", "down", "up"])
    with pytest.raises(ValidationError, match="weights_labels is set without weights"):
        ModelSettings(weights_labels=tmp_path / "labels.txt")


def test_backbone_weights_need_their_hash(tmp_path, caplog):
    source = create_model("tsn_resnet18", num_classes=3, num_segments=2)
    path = tmp_path / "backbone.pth"
    torch.save(source.base_model.state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    chosen = ModelSettings(name="gsm_resnet18", backbone_weights=str(path), backbone_sha256=sha256[:16])
    with caplog.at_level("INFO"):
        model = build_model(chosen, 4, 2)
    assert torch.equal(model.base_model.state_dict()["layer1.0.conv1.weight"], source.base_model.layer1[0].conv1.weight)
    assert "starts from the backbone weights" in caplog.text
    for wrong in (None, "0" * 8):
        with pytest.raises(ConfigError, match=r"model\.backbone_weights=.* cannot be used"):
            build_model(chosen.model_copy(update={"backbone_sha256": wrong}), 4, 2)
    with pytest.raises(ValidationError, match="both set"):
        ModelSettings(weights=path, backbone_weights=str(path))


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ValidationError, match=r"precise_bn_batches is 2, but batch_norm=partial keeps statistics"):
        TrainSettings(precise_bn_batches=2, batch_norm="partial")
    with pytest.raises(ValidationError, match=r"clip_each_micro_batch clips before fp16 has unscaled"):
        TrainSettings(precision="fp16", compat={"clip_each_micro_batch": True})
