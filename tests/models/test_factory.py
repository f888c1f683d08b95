import doctest
import importlib
import math

import pytest
import torch
from torch import nn

from models import SLOTS, create_model, list_models, model_options, parameter_roles

NETWORKS = [
    ("tsn_bn_inception", {}),
    ("gsm_bn_inception", {}),
    ("sa_gsm_bn_inception", {}),
    ("sa_gsm_bn_inception", {"placement": "3a+5b", "scope": "joint", "value": "bottleneck"}),
]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def open_up(model):
    """Give gates and gammas values other than their zeros, so that every part of the network counts."""
    for name, parameter in model.named_parameters():
        if name.endswith("conv3D.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


@pytest.mark.parametrize(
    "name, num_classes, expected",
    [
        ("tsn_bn_inception", 174, 10_448_590),
        ("gsm_bn_inception", 174, 10_499_650),
        ("sa_gsm_bn_inception", 174, 11_015_140),
        ("sa_gsm_bn_inception", 48, 10_885_990),
    ],
)
def test_parameters_are_as_many_as_published(name, num_classes, expected):
    assert count(create_model(name, num_classes=num_classes, num_segments=8)) == expected


def test_attention_costs_what_the_published_code_has_in_each_slot():
    without = count(create_model("sa_gsm_bn_inception", num_classes=2, num_segments=2, placement="none"))
    cost = {
        slot: count(create_model("sa_gsm_bn_inception", num_classes=2, num_segments=2, placement=slot)) - without
        for slot in SLOTS
    }
    published = [5_201, 5_201, 20_641, 63_001, 46_321, 32_201, 11_641, 20_641, 155_321, 155_321]
    assert cost == dict(zip(SLOTS, published, strict=True))


@pytest.mark.parametrize("name, options", NETWORKS)
@pytest.mark.parametrize("num_segments", [1, 3])
def test_logits_have_the_promised_shape_and_are_finite(name, options, num_segments):
    model = create_model(name, num_classes=5, num_segments=num_segments, **options)
    logits = model(model.prepare(torch.randint(0, 256, (2, num_segments, 3, 64, 48), dtype=torch.uint8)))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name, options", NETWORKS)
def test_every_trainable_parameter_gets_a_gradient(name, options):
    """In eval mode, because batch norm in training takes away what a bias before it adds. A key's bias moves all scores of a
    position alike, so no softmax sees it."""
    model = open_up(create_model(name, num_classes=5, num_segments=4, **options)).eval()
    nn.init.normal_(model.new_fc.weight)
    loss = nn.functional.cross_entropy(model(torch.randn(2, 4, 3, 64, 64)), torch.tensor([0, 1]))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    dead = [name for name, gradient in gradients.items() if torch.count_nonzero(gradient) == 0]
    assert [name for name in dead if not name.endswith("key_conv.bias")] == []


def test_gates_and_gammas_move_when_trained():
    model = create_model("sa_gsm_bn_inception", num_classes=2, num_segments=2)
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9)
    clips, labels = torch.randn(4, 2, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(clips), labels).backward()
        optimiser.step()
    assert len(roles["gate"]) == len(roles["gamma"]) == 10
    still = [name for name in roles["gate"] + roles["gamma"] if torch.count_nonzero(parameters[name]) == 0]
    assert still == []


@pytest.mark.parametrize("training", [True, False])
def test_with_gamma_at_zero_sa_gsm_is_gsm_bit_for_bit(training):
    gsm = create_model("gsm_bn_inception", num_classes=5, num_segments=4, dropout=0.0).train(training)
    sa_gsm = create_model("sa_gsm_bn_inception", num_classes=5, num_segments=4, dropout=0.0).train(training)
    open_up(gsm)
    missing, unexpected = sa_gsm.load_state_dict(gsm.state_dict(), strict=False)
    assert unexpected == []
    assert all(".attn." in name for name in missing)
    clips = torch.randn(2, 4, 3, 64, 64)
    assert torch.equal(sa_gsm(clips), gsm(clips))
    assert torch.equal(sa_gsm(clips), gsm(clips))  # running statistics moved alike


def test_sa_gsm_without_a_place_for_attention_has_the_weights_of_gsm():
    gsm = create_model("gsm_bn_inception", num_classes=5, num_segments=4)
    sa_gsm = create_model("sa_gsm_bn_inception", num_classes=5, num_segments=4, placement=0)
    assert list(sa_gsm.state_dict()) == list(gsm.state_dict())


def test_only_gates_tell_the_order_of_frames():
    clips = torch.randn(1, 4, 3, 64, 64)
    differs = {}
    for name in list_models():
        model = open_up(create_model(name, num_classes=5, num_segments=4)).eval()
        nn.init.normal_(model.new_fc.weight)
        with torch.inference_mode():
            differs[name] = not torch.allclose(model(clips), model(clips.flip(1)), rtol=1e-3, atol=1e-3)
    assert differs == {"tsn_bn_inception": False, "gsm_bn_inception": True, "sa_gsm_bn_inception": True}


@pytest.mark.parametrize("name, options", NETWORKS)
def test_channels_last_and_bfloat16_train(name, options):
    """In training mode: with the statistics of a fresh network, maps grow until rounding decides between positions."""
    model = open_up(create_model(name, num_classes=5, num_segments=4, dropout=0.0, **options))
    nn.init.normal_(model.new_fc.weight)
    clips = torch.randn(4, 4, 3, 64, 64)
    channels_last = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(clips.shape)
    expected = model(clips).detach()
    assert (model(channels_last) - expected).norm() < 1e-3 * expected.norm()
    for given in (clips, channels_last):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(given)
        assert logits.dtype == torch.bfloat16
        model.zero_grad()
        nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_fresh_network_expects_every_class_alike():
    model = create_model("gsm_bn_inception", num_classes=174, num_segments=2)
    loss = nn.functional.cross_entropy(model(torch.randn(2, 2, 3, 64, 64)), torch.tensor([3, 100]))
    assert loss.item() == pytest.approx(math.log(174), abs=0.1)


@pytest.mark.parametrize(
    "name, nearest",
    [("sa_gsm_bninception", "sa_gsm_bn_inception"), ("gsm", "gsm_bn_inception"), ("tsn-bn-inception", "tsn_bn_inception")],
)
def test_an_unknown_network_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"there is no network named '{name}'; did you mean {nearest}"):
        create_model(name, num_classes=5, num_segments=2)


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(ValueError) as refused:
        create_model("gsm_bn_inception", num_classes=5, num_segments=2, drop_out=0.1)
    assert str(refused.value) == (
        "gsm_bn_inception has no option 'drop_out'; did you mean dropout? known are: interleave, dropout, input_format"
    )
    with pytest.raises(ValueError, match="tsn_bn_inception has no option 'placement'; known are: dropout, input_format"):
        create_model("tsn_bn_inception", num_classes=5, num_segments=2, placement="all")


def test_options_have_the_published_defaults():
    assert model_options("sa_gsm_bn_inception") == {
        "placement": "all",
        "scope": "frame",
        "value": "fused",
        "interleave": True,
        "dropout": 0.5,
        "input_format": "unit_rgb",
    }


@pytest.mark.parametrize(
    "module", ["classifier", "factory", "placement", "temporal.gate_shift", "temporal.attention", "backbones.bn_inception"]
)
def test_the_examples_in_the_docstrings_run(module):
    loaded = importlib.import_module(f"models.{module}")
    assert doctest.testmod(loaded).failed == 0
