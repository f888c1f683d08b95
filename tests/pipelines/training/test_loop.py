import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from infra.errors import ConfigError, PipelineError
from infra.storage import sha256_file
from models import create_model
from pipelines.training.checkpoint import load_latest_verified, verify
from pipelines.training.loop import train
from preprocessing.loader import Batch

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
LOAD_TINY = f"""
import importlib.util, os, random, signal, sys, time
from pathlib import Path
import torch
spec = importlib.util.spec_from_file_location("tiny", {str(Path(__file__).with_name("conftest.py"))!r})
tiny = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
from pipelines.training.loop import train
torch.set_num_threads(1)
"""


def run_script(script, *arguments):
    command = [sys.executable, "-c", LOAD_TINY + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_tiny(tiny, checkpoint_dir, model=None, **options):
    changes = options.pop("settings", {})
    loaders = options.pop("loaders", (tiny.MemoryLoader(), tiny.MemoryLoader(9, train=False)))
    model = model or tiny.make_tiny_net()
    return train(model, *loaders, tiny.tiny_settings(**changes), checkpoint_dir=checkpoint_dir, device=CPU, **options)


def without_times(history):
    return [replace(epoch, seconds=0.0, clips_per_second=0.0, data_wait=0.0, peak_memory_bytes=0) for epoch in history]


def stop_after(num_steps):
    calls = []

    def should_stop():
        calls.append(None)
        return len(calls) >= num_steps

    return should_stop


def test_the_tiny_network_learns_its_colours(tiny, tmp_path):
    seen = []
    result = train_tiny(tiny, tmp_path, settings={"epochs": 6}, on_epoch=seen.append)
    assert result.completed
    assert result.resumed_from_step == 0
    assert seen == result.history
    assert [(epoch.epoch, epoch.step) for epoch in seen] == [(epoch, 5 * epoch + 5) for epoch in range(6)]
    assert seen[0].train_loss > seen[-1].train_loss
    assert result.best.val_top1 == max(epoch.val_top1 for epoch in seen) == 1.0
    assert result.best is next(epoch for epoch in seen if epoch.val_top1 == 1.0)
    assert result.best_weights == tmp_path / f"step-{result.best.step:08d}" / "weights.safetensors"
    assert result.last_weights == tmp_path / "step-00000030" / "weights.safetensors"
    assert seen[-1].gammas["gamma"] != 0


def test_a_second_call_has_nothing_left_to_do(tiny, tmp_path):
    first = train_tiny(tiny, tmp_path)
    model = tiny.make_tiny_net()
    second = train_tiny(tiny, tmp_path, model, on_epoch=pytest.fail)
    assert second == replace(first, resumed_from_step=10)
    assert torch.equal(model.linear.weight, load_file(first.last_weights)["linear.weight"])


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 7, 9])
def test_stopped_and_resumed_training_equals_undisturbed_training_bit_for_bit(tiny, tmp_path, num_steps, every):
    whole = train_tiny(tiny, tmp_path / "whole")
    changes = {"checkpoint_every_steps": every}
    first = train_tiny(tiny, tmp_path / "parts", settings=changes, should_stop=stop_after(num_steps))
    assert (first.completed, len(first.history)) == (False, num_steps // 5)
    second = train_tiny(tiny, tmp_path / "parts", settings=changes)
    assert second.resumed_from_step == num_steps
    assert without_times(second.history) == without_times(whole.history)
    assert sha256_file(second.last_weights) == sha256_file(whole.last_weights)
    assert sha256_file(second.best_weights) == sha256_file(whole.best_weights)
    optimizers = [torch.load(result.last_weights.with_name("optimizer.pt"), weights_only=True) for result in (whole, second)]
    assert str(optimizers[0]) == str(optimizers[1])


@pytest.mark.parametrize("every", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_training_ends_with_the_same_bits(tiny, tmp_path, every):
    """SIGKILL a moment after a random number of steps, again and again, until one attempt gets to the end."""
    whole = train_tiny(tiny, tmp_path / "whole", settings={"epochs": 4})
    script = """
    folder, every = Path(sys.argv[1]), int(sys.argv[2])
    rng, num_kills = random.Random(every), 0
    while True:
        step_taken, say_step = os.pipe()
        child = os.fork()
        if child == 0:
            loaders = tiny.MemoryLoader(), tiny.MemoryLoader(9, train=False)
            settings = tiny.tiny_settings(epochs=4, checkpoint_every_steps=every)
            should_stop = lambda: os.write(say_step, b".") == 0
            where = dict(checkpoint_dir=folder, device=torch.device("cpu"))
            train(tiny.make_tiny_net(), *loaders, settings, **where, should_stop=should_stop)
            os._exit(0)
        os.close(say_step)
        for _ in range(rng.randint(1, 8)):
            os.read(step_taken, 1)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(step_taken)
        if os.WIFEXITED(status):
            break
        num_kills += 1
    print(num_kills)
    sys.exit(os.WEXITSTATUS(status))
    """
    num_kills = int(run_script(script, tmp_path / "killed", every))
    assert num_kills > 0
    resumed = train_tiny(tiny, tmp_path / "killed", settings={"epochs": 4})
    assert without_times(resumed.history) == without_times(whole.history)
    assert sha256_file(resumed.last_weights) == sha256_file(whole.last_weights)
    assert not list((tmp_path / "killed").glob("damaged-*"))
    assert {path.name for path in (tmp_path / "killed").iterdir()} >= {"step-00000020"}


RANKS = """
import torch.distributed as dist
from infra.errors import PipelineError


class Fragile(tiny.TinyNet):
    def prepare(self, clips):
        return super().prepare(clips) * torch.where(torch.arange(len(clips)) == 0, float("nan"), 1.0)[:, None, None, None, None]


folder, world_size = Path(sys.argv[1]), 2
children = []
for rank in range(world_size):
    child = os.fork()
    if child:
        children.append(child)
        continue
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)

    def train_here(model, folder):
        loaders = [tiny.MemoryLoader(n, batch_size=4, train=n == 22, rank=rank, world_size=world_size) for n in (22, 9)]
        return train(model, *loaders, tiny.tiny_settings(), checkpoint_dir=folder, device=torch.device("cpu"))

    last = train_here(tiny.make_tiny_net(with_norm=False, dropout=0.0), folder / "two").history[-1]
    (folder / f"metrics{rank}").write_text(f"{last.train_loss} {last.val_top1} {last.val_loss}")
    try:
        train_here(Fragile(with_norm=False), folder / "broken")
    except PipelineError as error:
        (folder / f"error{rank}").write_text(str(error))
    dist.destroy_process_group()
    os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def test_two_ranks_equal_one_and_stop_together(tiny, tmp_path):
    """Without batch norm and dropout; 22 clips in 3 steps, so that the ranks' parts differ in size."""
    run_script(RANKS, tmp_path)
    loaders = tiny.MemoryLoader(22, batch_size=8), tiny.MemoryLoader(9, batch_size=8, train=False)
    whole = train_tiny(tiny, tmp_path / "one", tiny.make_tiny_net(with_norm=False, dropout=0.0), loaders=loaders)
    metrics = [(tmp_path / f"metrics{rank}").read_text() for rank in range(2)]
    assert metrics[0] == metrics[1]
    last = whole.history[-1]
    expected = pytest.approx([last.train_loss, last.val_top1, last.val_loss], rel=1e-4)
    assert [float(number) for number in metrics[0].split()] == expected
    two, one = load_file(tmp_path / "two" / "step-00000006" / "weights.safetensors"), load_file(whole.last_weights)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    messages = [(tmp_path / f"error{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert re.match(r"the loss of clips clip\d+, clip\d+ is not finite in step 0 \(epoch 0\)", messages[0])  # one of each rank
    assert not list(tmp_path.glob("broken/step-*"))


def test_metrics_are_means_over_clips_when_the_last_batch_is_short(tiny, tmp_path):
    model = tiny.make_tiny_net()
    loaders = tiny.MemoryLoader(7, batch_size=3), tiny.MemoryLoader(10, batch_size=4, train=False)
    result = train_tiny(tiny, None, model, loaders=loaders, settings={"epochs": 1})
    assert (result.best_weights, result.last_weights) == (None, None)
    with torch.no_grad():
        logits = model.eval()(model.prepare(loaders[1].clips))
    assert result.history[0].val_loss == pytest.approx(cross_entropy(logits, loaders[1].labels).item(), rel=1e-5)
    assert result.history[0].val_top1 == pytest.approx((logits.argmax(1) == loaders[1].labels).float().mean().item())
    assert result.history[0].val_top5 == 1.0


def white_is_infinite(tiny):
    class Fragile(tiny.TinyNet):
        def prepare(self, clips):
            return super().prepare(clips) / (255 - clips.float().amin(dim=(1, 2, 3, 4), keepdim=True))

    torch.manual_seed(7)
    return Fragile(with_norm=False)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_clip(tiny, tmp_path):
    loader = tiny.MemoryLoader()
    loader.clips[11] = 255
    model = white_is_infinite(tiny)
    with pytest.raises(PipelineError) as error:
        train_tiny(
            tiny, tmp_path, model, loaders=(loader, tiny.MemoryLoader(9, train=False)), settings={"checkpoint_every_steps": 1}
        )
    message = str(error.value)
    assert "the loss of clips clip11 is not finite in step" in message
    assert "lower train.learning_rate=0.1" in message
    newest = max(tmp_path.glob("step-*"), default=None)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    assert f"in step {step} (epoch 0)" in message
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if newest:
        verify(newest)
        assert torch.equal(load_file(newest / "weights.safetensors")["conv.weight"], model.conv.weight)


def test_a_gradient_that_is_not_finite_stops_too(tiny):
    model = tiny.make_tiny_net()
    model.linear.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(PipelineError, match=r"the gradient \(norm nan|inf\) is not finite in step 0"):
        train_tiny(tiny, None, model)


def test_a_diverged_validation_is_an_error(tiny):
    model = tiny.make_tiny_net()
    model.linear.register_forward_hook(lambda module, inputs, output: output if module.training else output * float("nan"))
    with pytest.raises(PipelineError, match=r"the validation loss is nan; expected a number"):
        train_tiny(tiny, None, model)


def test_checkpoints_of_another_training_are_refused(tiny, tmp_path):
    train_tiny(tiny, tmp_path, identity={"label_passport": "aa"})
    with pytest.raises(ConfigError, match=r"train\.momentum 0\.9 there and 0\.8 now"):
        train_tiny(tiny, tmp_path, settings={"momentum": 0.8}, identity={"label_passport": "aa"})
    with pytest.raises(ConfigError, match="label_passport 'aa' there and 'bb' now"):
        train_tiny(tiny, tmp_path, identity={"label_passport": "bb"})
    operational = {"loader_threads": 1, "checkpoint_every_steps": 7, "max_failures": 0}
    assert train_tiny(tiny, tmp_path, settings=operational, identity={"label_passport": "aa"}).completed


def test_bf16_computes_over_fp32_weights(tiny, tmp_path):
    dtypes = set()
    model = tiny.make_tiny_net()
    model.conv.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    result = train_tiny(tiny, tmp_path, model, settings={"precision": "bf16", "epochs": 6})
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(result.last_weights).values()} == {torch.float32, torch.int64}
    assert result.best.val_top1 == 1.0
    fp32 = train_tiny(tiny, None, settings={"epochs": 6})
    assert result.history[0].train_loss == pytest.approx(fp32.history[0].train_loss, rel=0.05)


def test_epochs_that_are_not_due_are_not_validated_but_the_last_is(tiny, tmp_path):
    history = train_tiny(tiny, tmp_path, settings={"epochs": 5, "validate_every_epochs": 2}).history
    assert [epoch.val_top1 is not None for epoch in history] == [False, True, False, True, True]
    assert [path.name for path in sorted(tmp_path.iterdir())][-1] == "step-00000025"


def test_the_real_network_trains_and_resumes_bit_for_bit(tiny, tmp_path):
    class Clips(tiny.MemoryLoader):
        def __iter__(self):
            for batch in super().__iter__():
                clips = batch.clips.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
                yield Batch(clips, batch.labels, batch.keys, batch.num_global)

    def model():
        torch.manual_seed(0)
        return create_model("sa_gsm_bn_inception", num_classes=3, num_segments=2, placement="3a,5b")

    settings = {"epochs": 1, "precision": "auto"}
    loaders = Clips(8), Clips(4, train=False)
    whole = train_tiny(tiny, tmp_path / "whole", model(), loaders=loaders, settings=settings)
    train_tiny(tiny, tmp_path / "parts", model(), loaders=loaders, settings=settings, should_stop=stop_after(1))
    second = train_tiny(tiny, tmp_path / "parts", model(), loaders=loaders, settings=settings)
    assert second.resumed_from_step == 1
    assert sha256_file(second.last_weights) == sha256_file(whole.last_weights)
    assert set(whole.history[-1].gammas) == {"3a", "5b"}
    assert all(gamma != 0 for gamma in whole.history[-1].gammas.values())


def test_the_best_weights_are_those_of_the_best_epoch(tiny, tmp_path):
    """Validation labels that nothing can be learned for make the first epoch the best."""
    val_loader = tiny.MemoryLoader(9, train=False)
    after = []
    model = tiny.make_tiny_net()
    result = train_tiny(
        tiny,
        tmp_path,
        model,
        loaders=(tiny.MemoryLoader(), val_loader),
        settings={"epochs": 5},
        on_epoch=lambda epoch: after.append((epoch.val_top1, model.linear.weight.detach().clone())),
    )
    best = max(range(5), key=lambda epoch: after[epoch][0])
    assert result.best.epoch == best
    assert torch.equal(load_file(result.best_weights)["linear.weight"], after[best][1])
    assert len(list(tmp_path.glob("step-*"))) <= 3
    assert load_latest_verified(tmp_path, verify(tmp_path / "step-00000025")["identity"]).progress.epoch == 5
