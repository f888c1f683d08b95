import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import create_model, load_published_weights
from models.temporal.relation import MultiScaleRelation

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"


def small(num_classes=3, **options):
    return create_model("sa_gsm_bn_inception", num_classes=num_classes, num_segments=2, placement="5b", **options)


@pytest.fixture
def source():
    model = small()
    torch.nn.init.normal_(model.new_fc.weight)
    return model


def assert_equal_weights(model, other):
    for (name, tensor), (other_name, other_tensor) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(tensor, other_tensor), name


def as_state_dict(state, tmp_path):
    return state


def as_published(state, tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save({"epoch": 60, "arch": "BNInception", "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return path


def as_pth(state, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(state, path)
    return str(path)


def as_safetensors(state, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("form", [as_state_dict, as_published, as_pth, as_safetensors])
def test_weights_load_from_every_form(form, source, tmp_path):
    model = small()
    load_published_weights(model, form(source.state_dict(), tmp_path))
    assert_equal_weights(model, source)


def test_all_that_does_not_fit_is_in_one_message_and_nothing_is_loaded(source):
    state = source.state_dict()
    gamma = "base_model.gsm_inception_5b_1x1.attn.gamma"
    del state[gamma], state["new_fc.bias"]
    state["new_fc.weight"] = torch.zeros(174, 1024)
    state["fc.weight"] = torch.zeros(2)
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as refused:
        load_published_weights(model, state)
    assert str(refused.value).splitlines() == [
        "the state dict does not fit the network; make the network that it was saved from (name, num_classes, options):",
        f"  missing: {gamma} [1]",
        "  missing: new_fc.bias [3]",
        "  unexpected: fc.weight [2]",
        "  shape: new_fc.weight is [174, 1024], expected [3, 1024]",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "tensor, kind",
    [
        (torch.ones(3, dtype=torch.complex64), "complex"),
        (torch.ones(3, dtype=torch.int8), "whole numbers"),
        (torch.ones(3, dtype=torch.bool), "whole numbers"),
        (torch.ones(3, device="meta"), "sparse, quantised or without numbers"),
        (torch.ones(3).to_sparse(), "sparse, quantised or without numbers"),
    ],
)
def test_tensors_of_another_kind_are_refused_and_nothing_is_loaded(tensor, kind, source):
    """PyTorch would take whole numbers as they are, and stop half way at the others."""
    model = small()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"  kind: new_fc.bias is {kind}, expected real"):
        load_published_weights(model, source.state_dict() | {"new_fc.bias": tensor})
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_load(dtype, source):
    model = small()
    load_published_weights(model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.state_dict().items()})
    torch.testing.assert_close(model.new_fc.weight, source.new_fc.weight, rtol=1e-2, atol=1e-2)


class Trap:
    """What a hostile checkpoint would hold: an object whose unpickling runs code."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth cannot be read as weights alone .* save its state dict again as"):
        load_published_weights(small(), "trap.pth")
    assert not Path("trapped").exists()


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_a_broken_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights alone"):
        load_published_weights(small(), tmp_path / name)


@pytest.mark.parametrize("content, message", [([1, 2], "holds a list"), ({"a": 1}, "holds other things than named tensors")])
def test_other_content_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth {message}"):
        load_published_weights(small(), tmp_path / "other.pth")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_published_weights(small(), tmp_path / "nowhere.pth")


def test_names_of_tsm_and_of_an_old_pytorch_are_understood(tmp_path):
    model = create_model("tsm_resnet18", num_classes=3, num_segments=2)
    source = create_model("tsm_resnet18", num_classes=3, num_segments=2)
    published = {
        f"module.{name}".replace(".conv1.weight", ".conv1.net.weight").replace(
            "base_model.conv1.net.", "base_model.conv1."
        ): tensor
        for name, tensor in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert "module.base_model.layer1.0.conv1.net.weight" in published
    assert "module.base_model.conv1.weight" in published
    torch.save({"state_dict": published}, tmp_path / "tsm.pth.tar")
    load_published_weights(model, tmp_path / "tsm.pth.tar")
    assert_equal_weights(model, source)


LABELS = ["push", "pull", "turn"]


@pytest.mark.parametrize("name", ["tsn_bn_inception", "trn_bn_inception"])
def test_classes_are_put_in_the_order_of_the_dataset(name):
    source = create_model(name, num_classes=3, num_segments=3).eval()
    torch.nn.init.normal_(source.new_fc.weight)
    model = create_model(name, num_classes=3, num_segments=3).eval()
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    load_published_weights(model, source.state_dict(), class_order=LABELS, label_names=["turn", "push", "pull"])
    clips = torch.randn(1, 3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(clips), source(clips)[:, [2, 0, 1]])
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    "orders, message",
    [
        ({"class_order": LABELS}, "go together; only one of them was given"),
        ({"label_names": LABELS}, "go together; only one of them was given"),
        (
            {"class_order": LABELS[:2], "label_names": LABELS},
            "class_order has 2 labels, 2 of them different; the network has 3",
        ),
        (
            {"class_order": LABELS, "label_names": ["push"] * 3},
            "label_names has 3 labels, 1 of them different; the network has 3",
        ),
        ({"class_order": LABELS, "label_names": ["push", "pull", "lift"]}, "other labels; it has no class for: 'lift'"),
    ],
)
def test_orders_of_classes_that_do_not_match_are_refused(orders, message, source):
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published_weights(model, source.state_dict(), **orders)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


NAMES = [
    "tsn_bn_inception",
    "gsm_bn_inception",
    "sa_gsm_bn_inception",
    "gsm_inception_v3",
    "tsn_resnet50",
    "tsm_resnet50",
]


def load_reference(name):
    spec = importlib.util.spec_from_file_location("recipe", REFERENCE / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.load(REFERENCE / f"{name}.json")


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the published numbers are not here: {REFERENCE} does not exist")
@pytest.mark.parametrize("name", NAMES)
def test_published_weights_give_the_published_logits(name):
    facts, state, clips = load_reference(name)

    model = create_model(name, num_classes=174, num_segments=facts["num_segments"]).eval()
    ours = {key.replace(".conv1.net.", ".conv1.") for key in facts["keys"]}
    assert set(model.state_dict()) == ours
    load_published_weights(model, state)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["params"]

    expected = torch.tensor(facts["logits"], dtype=torch.float64)
    channels_last = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(clips.shape)
    cases = [
        ("contiguous", clips, False, 1e-4),
        ("channels_last", channels_last, False, 1e-4),
        ("bfloat16", channels_last, True, 0.1),
    ]
    for case, given, autocast, allowed in cases:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            error = (model(given)[0].double() - expected).norm() / expected.norm()
        print(f"{name}, {case}: relative error of the logits {error:.1e}")
        assert error < allowed, case


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the published numbers are not here: {REFERENCE} does not exist")
def test_the_published_relation_head_gives_the_published_logits():
    facts, state, features = load_reference("trn_multiscale_head")
    head = MultiScaleRelation(facts["num_segments"], 174).eval()
    load_published_weights(head, state)
    assert sum(parameter.numel() for parameter in head.parameters()) == facts["params"]
    expected = torch.tensor(facts["logits"], dtype=torch.float64)
    with torch.inference_mode():
        error = (head(features)[0].double() - expected).norm() / expected.norm()
    print(f"trn_multiscale_head: relative error of the logits {error:.1e}")
    assert error < 1e-4


def test_a_damaged_file_of_an_old_pytorch_is_told_as_such(tmp_path):
    """In this form the names of the storages follow the pickle; one that was damaged is missed by an assertion in PyTorch."""
    path = tmp_path / "old.pth"
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    [*_, name] = re.findall(rb"\d{9,}", content)
    path.write_bytes(name[::-1].join(content.rsplit(name, maxsplit=1)))
    with pytest.raises(ValueError, match=r"old\.pth cannot be read as weights alone"):
        load_published_weights(small(), path)


@pytest.mark.parametrize("content", [b"hello world\n", b"a.", b"\x80\x02" + bytes(range(200))])
def test_bytes_that_are_no_weights_are_told_as_such(tmp_path, content):
    (tmp_path / "odd.pth").write_bytes(content)
    model = create_model("tsn_resnet18", num_classes=2, num_segments=2)
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_published_weights(model, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="holds other things than named tensors"):
        load_published_weights(model, {0: torch.zeros(1)})
