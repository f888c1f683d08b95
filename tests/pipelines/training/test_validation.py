import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from models import create_model
from pipelines.training.run import set_up
from pipelines.training.validation import validate

CPU = torch.device("cpu")


def run_of(tiny, model, **changes):
    return set_up(model, tiny.MemoryLoader(), tiny.tiny_settings(**changes), CPU, None, {})


def test_the_average_is_what_is_validated_and_kept_as_the_best_weights(tiny, tmp_path):
    settings = {"epochs": 3, "ema_decay": 0.8}
    result = tiny.train_tiny(tmp_path, settings=settings)
    assert result.best_weights.name == "average.safetensors"
    assert result.last_weights.name == "weights.safetensors"
    loader = tiny.MemoryLoader(9, train=False)
    losses = {}
    for name in ("average", "weights"):
        model = tiny.make_tiny_net().eval()
        model.load_state_dict(load_file(tmp_path / "step-00000015" / f"{name}.safetensors"))
        with torch.no_grad():
            losses[name] = cross_entropy(model(model.prepare(loader.clips)), loader.labels).item()
    assert result.history[-1].val_loss == pytest.approx(losses["average"], rel=1e-5)
    assert result.history[-1].val_loss != pytest.approx(losses["weights"], rel=1e-3)


def test_without_mean_and_deviation_as_the_published_validation(tiny):
    for input_format, scale in (("unit_rgb", 255.0), ("caffe_bgr", 1.0)):
        model = create_model("tsn_resnet18", num_classes=3, num_segments=2, input_format=input_format)
        seen = []
        model.base_model.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].clone()))
        loader = tiny.LargeLoader(3, train=False)
        run = run_of(tiny, model, compat={"val_protocol": "seed_code"})
        validate(run, loader, epoch=0)
        clips = next(iter(loader)).clips.flatten(0, 1).float() / scale
        expected = clips.flip(1) if input_format == "caffe_bgr" else clips
        torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_validation_starts_at_the_epochs_own_clips(tiny):
    """Under the published protocol crops are random: a resumed run must draw those of its epoch."""
    loader = tiny.MemoryLoader(9, train=False)
    sought = []
    loader.seek = lambda epoch, step=0: sought.append((epoch, step))
    tiny.train_tiny(None, loaders=(tiny.MemoryLoader(), loader), settings={"epochs": 3})
    assert sought == [(0, 0), (1, 0), (2, 0)]


def test_precise_statistics_are_those_of_the_first_training_clips_of_the_epoch(tiny):
    model = tiny.make_tiny_net()
    run = run_of(tiny, model, precise_bn_batches=3, batch_size=2)
    validate(run, tiny.MemoryLoader(9, train=False), epoch=1)
    loader = tiny.MemoryLoader()
    loader.seek(1)
    clips = torch.cat([batch.clips for batch in loader])[:6]
    with torch.no_grad():
        maps = [model.conv(model.prepare(pair).flatten(0, 1)) for pair in clips.split(2)]
    torch.testing.assert_close(model.norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0))


def test_gates_are_measured_where_there_are_any(tiny):
    model = create_model("gsm_resnet18", num_classes=3, num_segments=2)
    _, gates = validate(run_of(tiny, model), tiny.LargeLoader(3, train=False), epoch=0)
    assert set(gates) == {f"layer{layer}.{block}_mean_abs" for layer in range(1, 5) for block in range(2)}
    assert validate(run_of(tiny, tiny.make_tiny_net()), tiny.MemoryLoader(3, train=False), epoch=0)[1] == {}
