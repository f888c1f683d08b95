import doctest
import importlib
import math

import pytest
import torch
from torch import nn

from models import (
    SLOTS,
    create_model,
    list_models,
    load_published_weights,
    model_options,
    model_slots,
    parameter_roles,
    parse_placement,
)
from models.temporal.attention import SCOPES
from models.temporal.shift import TemporalShift

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


@pytest.mark.parametrize("name", ["sa_gsm_bn_inception", "sa_gsm_resnet18", "sa_gsm_inception_v3"])
def test_gates_and_gammas_move_when_trained(name):
    model = create_model(name, num_classes=2, num_segments=2)
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9)
    clips, labels = torch.randn(4, 2, 3, 75, 75), torch.tensor([0, 1, 0, 1])
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(clips), labels).backward()
        optimiser.step()
    assert len(roles["gate"]) == len(roles["gamma"]) == len(model_slots(name))
    still = [name for name in roles["gate"] + roles["gamma"] if torch.count_nonzero(parameters[name]) == 0]
    assert still == []


@pytest.mark.parametrize("backbone, scope", [("bn_inception", "frame"), ("resnet18", "divided"), ("inception_v3", "joint")])
@pytest.mark.parametrize("training", [True, False])
def test_with_gamma_at_zero_sa_gsm_is_gsm_bit_for_bit(training, backbone, scope):
    gsm = create_model(f"gsm_{backbone}", num_classes=5, num_segments=4, dropout=0.0).train(training)
    sa_gsm = create_model(f"sa_gsm_{backbone}", num_classes=5, num_segments=4, dropout=0.0, scope=scope).train(training)
    open_up(gsm)
    missing, unexpected = sa_gsm.load_state_dict(gsm.state_dict(), strict=False)
    assert unexpected == []
    assert all(".attn." in name for name in missing)
    clips = torch.randn(2, 4, 3, 75, 75)
    assert torch.equal(sa_gsm(clips), gsm(clips))
    assert torch.equal(sa_gsm(clips), gsm(clips))  # running statistics moved alike


def test_sa_gsm_without_a_place_for_attention_has_the_weights_of_gsm():
    gsm = create_model("gsm_bn_inception", num_classes=5, num_segments=4)
    sa_gsm = create_model("sa_gsm_bn_inception", num_classes=5, num_segments=4, placement=0)
    assert list(sa_gsm.state_dict()) == list(gsm.state_dict())


def test_all_but_tsn_tell_the_order_of_frames():
    clips = torch.randn(1, 4, 3, 64, 64)
    differs = {}
    names = ["tsn_bn_inception", "gsm_bn_inception", "sa_gsm_bn_inception"]
    names += ["tsn_resnet18", "trn_resnet18", "tsm_resnet18", "gsm_resnet18", "r3d_18"]
    for name in names:
        model = open_up(create_model(name, num_classes=5, num_segments=4)).eval()
        nn.init.normal_(model.new_fc.weight)
        with torch.inference_mode():
            differs[name] = not torch.allclose(model(clips), model(clips.flip(1)), rtol=1e-3, atol=1e-3)
    assert differs == {name: not name.startswith("tsn_") for name in names}


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
        assert logits.dtype == torch.float32
        model.zero_grad()
        nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_fresh_network_expects_every_class_alike():
    model = create_model("gsm_bn_inception", num_classes=174, num_segments=2)
    loss = nn.functional.cross_entropy(model(torch.randn(2, 2, 3, 64, 64)), torch.tensor([3, 100]))
    assert loss.item() == pytest.approx(math.log(174), abs=0.1)


def test_every_method_stands_on_every_backbone_where_it_makes_sense():
    backbones = ["bn_inception", "inception_v3", "resnet18", "resnet50", "resnet101"]
    expected = [f"{method}_{name}" for method in ("tsn", "trn", "gsm", "sa_gsm") for name in backbones]
    expected += [f"tsm_{name}" for name in backbones[2:]] + ["c3d", "r2plus1d_18", "mc3_18", "r3d_18", "s3d"]
    assert sorted(list_models()) == sorted(expected)


@pytest.mark.parametrize("name", ["sa_gsm_bn_inception", "sa_gsm_inception_v3", "sa_gsm_resnet50"])
def test_attention_stands_in_the_slots_of_the_placement(name):
    for placement in ("stage4", "none", "all", 3):
        with torch.device("meta"):
            model = create_model(name, num_classes=5, num_segments=2, placement=placement)
        slots = parse_placement(placement, model_slots(name))
        assert len(parameter_roles(model)["gamma"]) == len(slots)
        assert len(parameter_roles(model)["gate"]) == len(model_slots(name))


@pytest.mark.parametrize("depth, shifts", [(18, 8), (50, 16), (101, 2 + 2 + 12 + 2)])
def test_tsm_shifts_in_every_block_or_in_a_deep_network_in_every_second(depth, shifts):
    with torch.device("meta"):
        model = create_model(f"tsm_resnet{depth}", num_classes=5, num_segments=2)
    assert sum(isinstance(module, TemporalShift) for module in model.modules()) == shifts


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("sa_gsm_bninception", "sa_gsm_bn_inception"),
        ("gsm_resnet_50", "gsm_resnet50"),
        ("tsn-bn-inception", "tsn_bn_inception"),
    ],
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
        "scaled": False,
        "num_heads": 1,
        "interleave": True,
        "dropout": 0.5,
        "input_format": "unit_rgb",
    }


@pytest.mark.parametrize(
    "module",
    [
        "classifier",
        "facts",
        "factory",
        "placement",
        "backbones.resnet",
        "temporal.gate_shift",
        "temporal.attention",
        "temporal.shift",
    ],
)
def test_the_examples_in_the_docstrings_run(module):
    loaded = importlib.import_module(f"models.{module}")
    assert doctest.testmod(loaded).failed == 0


NUM_CLASSES = 5
SIZES = {"inception_v3": [(101, 101), (80, 75)]}
"""Frames on which the deepest map has more than one position, then others; 64 x 64 and 48 x 32 where nothing is said."""


def grid():
    for name in list_models():
        scopes = SCOPES if "scope" in model_options(name) else [None]
        for scope in scopes:
            small = name.endswith(("bn_inception", "resnet18"))
            large = name.endswith(("resnet101", "c3d"))
            marks = [pytest.mark.slow] if large or (scope not in (None, "frame") and not small) else []
            options = {"scope": scope} if scope else {}
            yield pytest.param(name, options, id=f"{name}-{scope}" if scope else name, marks=marks)


def calibrate(model, clips):
    """Set the statistics of batch norms to those of the clips, so that maps neither grow nor fade; leaves eval mode on."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(clips)
    return model.eval()


def sizes_of(name):
    return next((sizes for backbone, sizes in SIZES.items() if name.endswith(backbone)), [(64, 64), (48, 32)])


@pytest.mark.parametrize("name, options", list(grid()))
def test_every_model(name, options):
    for num_segments in (2, 3):
        model = open_up(create_model(name, num_classes=NUM_CLASSES, num_segments=num_segments, **options))
        nn.init.normal_(model.new_fc.weight, std=0.1)
        batches = [torch.randn(2, num_segments, 3, *size) for size in sizes_of(name)]
        calibrate(model, batches[0])
        for clips in batches:
            with torch.inference_mode():
                logits = model(clips)
            assert logits.shape == (2, NUM_CLASSES)
            assert logits.isfinite().all()
    assert_every_parameter_gets_a_gradient(model, batches[0])
    assert_weights_come_back(model, batches[0])
    small = model.min_pixels - 1
    with pytest.raises(ValueError, match=f"got frames of 128 x {small} pixels, but its backbone needs at least {small + 1} x"):
        model(torch.zeros(1, 3, 3, 128, small))


def assert_every_parameter_gets_a_gradient(model, clips):
    """In eval mode, because batch norm in training takes away what a bias before it adds. A key's bias moves all scores of a
    position alike, so no softmax sees it."""
    model.zero_grad()
    nn.functional.cross_entropy(model(clips), torch.tensor([0, 1])).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    dead = [name for name, gradient in gradients.items() if torch.count_nonzero(gradient) == 0]
    assert [name for name in dead if not name.endswith("key_conv.bias")] == []


def assert_weights_come_back(model, clips):
    """All that makes the network what it is stands in its state dict."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(clips)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    with torch.inference_mode():
        assert not torch.equal(model(clips), expected)
    load_published_weights(model, state)
    with torch.inference_mode():
        assert torch.equal(model(clips), expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.endswith(("resnet50", "resnet101", "inception_v3")) else [])
        for name in list_models()
    ],
)
def test_wrong_arguments_are_refused_by_every_model(name):
    def make(**changed):
        with torch.device("meta"):
            create_model(name, **{"num_classes": NUM_CLASSES, "num_segments": 2, **changed})

    wrong = [
        ({"num_classes": 0}, "0"),
        ({"num_segments": 0}, "0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"input_format": "yuv"}, "input format 'yuv' is not known; known are: unit_rgb, caffe_bgr"),
        ({"colour": 1}, f"{name} has no option 'colour'"),
    ]
    if "scope" in model_options(name):
        wrong += [
            ({"scope": "all"}, "attention scope 'all' is not known; known are: frame, temporal, joint, divided"),
            ({"value": "wide"}, "attention value 'wide' is not known; known are: fused, bottleneck"),
            ({"placement": "9z"}, "'9z' is not a slot: the slots are "),
            ({"placement": -1}, "the bit mask -1 names slots that do not exist"),
        ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            make(**changed)
