import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import create_model, load_published_weights

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


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the published numbers are not here: {REFERENCE} does not exist")
@pytest.mark.parametrize("name", ["tsn_bn_inception", "gsm_bn_inception", "sa_gsm_bn_inception"])
def test_published_weights_give_the_published_logits(name):
    spec = importlib.util.spec_from_file_location("recipe", REFERENCE / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    facts, state, clips = recipe.load(REFERENCE / f"{name}.json")

    model = create_model(name, num_classes=174, num_segments=facts["num_segments"]).eval()
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
