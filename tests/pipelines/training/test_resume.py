"""Killed, resumed, and resumed with another number of ranks; the ranks of all tests train in one process of their own."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import ConfigError
from infra.storage import sha256_file
from pipelines.training.checkpoint import Progress
from pipelines.training.resume import gather_ledger, ledger_for, sums_for
from preprocessing.clip_ledger import ClipLedger

EVERYTHING = {"batch_size": 3, "accumulation": 2, "ema_decay": 0.9, "precision": "fp16", "mixup_alpha": 0.2}
EVERYTHING |= {"precise_bn_batches": 2}
PARTIAL = {"batch_norm": "partial", "cutmix_alpha": 1.0}
KILLED = """
import json
folder, real, most_steps = Path(sys.argv[1]), sys.argv[3] == "real", int(sys.argv[4])
settings = json.loads(sys.argv[2])
rng, num_kills = random.Random(str(settings)), 0


def model():
    if not real:
        return tiny.make_tiny_net()
    from models import create_model
    torch.manual_seed(0)
    return create_model("sa_gsm_bn_inception", num_classes=3, num_segments=2, placement="3a,5b")


while True:
    step_taken, say_step = os.pipe()
    may_go_on, let_go_on = os.pipe()
    child = os.fork()
    if child == 0:
        kind = tiny.LargeLoader if real else tiny.MemoryLoader
        loaders = kind(), kind(9, train=False)
        should_stop = lambda: not (os.write(say_step, b".") and os.read(may_go_on, 1))
        tiny.train_tiny(folder, model(), loaders=loaders, settings=settings, should_stop=should_stop)
        os._exit(0)
    os.close(say_step)
    for _ in range(rng.randint(1, most_steps)):
        os.read(step_taken, 1)
        os.write(let_go_on, b".")
    time.sleep(rng.uniform(0, 0.02))  # in which it takes at most one more step
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    for end in (step_taken, may_go_on, let_go_on):
        os.close(end)
    if os.WIFEXITED(status):
        break
    num_kills += 1
print(num_kills)
sys.exit(os.WEXITSTATUS(status))
"""


def check_killed(tiny, tmp_path, settings, model=None, loaders=None, most_steps=3):
    undisturbed = {**settings, "checkpoint_every_steps": 0}
    whole = tiny.train_tiny(tmp_path / "whole", model and model(), loaders=loaders, settings=undisturbed)
    kind = "real" if model else "tiny"
    num_kills = int(tiny.run_script(KILLED, tmp_path / "killed", json.dumps(settings), kind, most_steps))
    resumed = tiny.train_tiny(tmp_path / "killed", model and model(), loaders=loaders, settings=settings)
    assert tiny.without_times(resumed.history) == tiny.without_times(whole.history)
    assert not list((tmp_path / "killed").glob("damaged-*"))
    for name in ("weights.safetensors", *(["average.safetensors"] if "ema_decay" in settings else [])):
        assert sha256_file(resumed.last_weights.with_name(name)) == sha256_file(whole.last_weights.with_name(name))
    optimizers = [torch.load(result.last_weights.with_name("optimizer.pt"), weights_only=True) for result in (whole, resumed)]
    assert str(optimizers[0]) == str(optimizers[1])
    return num_kills


@pytest.mark.parametrize(
    "options", [EVERYTHING, *(pytest.param(options, marks=pytest.mark.slow) for options in ({}, PARTIAL))], ids=str
)
def test_a_training_killed_ten_times_ends_with_the_same_bits(tiny, tmp_path, options):
    """SIGKILL a moment after one to three of the 40 steps, again and again, until one attempt gets to the end."""
    assert check_killed(tiny, tmp_path, {"epochs": 8, "checkpoint_every_steps": 1, **options}) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 3])
def test_a_killed_training_repeats_the_steps_since_its_checkpoint(tiny, tmp_path, every):
    settings = {"epochs": 4, "checkpoint_every_steps": every, "ema_decay": 0.9}
    assert check_killed(tiny, tmp_path, settings, most_steps=8) > 0


@pytest.mark.slow
def test_the_real_network_killed_ends_with_the_same_bits(tiny, tmp_path):
    from models import create_model

    def model():
        torch.manual_seed(0)
        return create_model("sa_gsm_bn_inception", num_classes=3, num_segments=2, placement="3a,5b")

    settings = {"epochs": 2, "checkpoint_every_steps": 1, "precision": "auto", "ema_decay": 0.9}
    loaders = tiny.LargeLoader(), tiny.LargeLoader(9, train=False)
    assert check_killed(tiny, tmp_path, settings, model, loaders) > 2


RANKS = """
import json
from dataclasses import dataclass
from infra.errors import PipelineError


class Fragile(tiny.TinyNet):
    def prepare(self, clips):
        return super().prepare(clips) * torch.where(torch.arange(len(clips)) == 0, float("nan"), 1.0)[:, None, None, None, None]


@dataclass
class Noted(tiny.MemoryLoader):
    path: Path = None

    def __iter__(self):
        for batch in super().__iter__():
            with self.path.open("a") as file:
                file.write(json.dumps(batch.keys) + chr(10))
            yield batch


def train_here(folder, rank, world_size, stop=None, **settings):
    train_keys, val_keys = [folder / f"{name}-{rank}-of-{world_size}" for name in ("train", "val")]
    loaders = Noted(22, 4, True, rank, world_size, path=train_keys), Noted(9, 4, False, rank, world_size, path=val_keys)
    options = {"should_stop": tiny.stop_after(stop)} if stop else {}
    net = tiny.make_tiny_net(with_norm=False, dropout=0.0)
    settings = {"epochs": 4, **settings}
    where = folder / "checkpoints" if rank == 0 else None  # the others see no checkpoint
    result = tiny.train_tiny(where, net, loaders=loaders, settings=settings, **options)
    (folder / f"history-{rank}-of-{world_size}").write_text(repr(tiny.without_times(result.history)))
    return result


def broken(rank):
    loaders = [tiny.MemoryLoader(n, 4, n == 22, rank, 2) for n in (22, 9)]
    try:
        tiny.train_tiny(root / "broken", Fragile(with_norm=False), loaders=loaders)
    except PipelineError as error:
        (root / f"error{rank}").write_text(str(error))


def everything(rank):
    loaders = [tiny.MemoryLoader(n, 4, n == 22, rank, 2) for n in (22, 9)]
    settings = {"batch_size": 2, "accumulation": 2, "ema_decay": 0.9, "precise_bn_batches": 2}
    result = tiny.train_tiny(root / "everything" if rank == 0 else None, loaders=loaders, settings=settings)
    (root / f"everything{rank}").write_text(repr(tiny.without_times(result.history)))


root = Path(sys.argv[1])
tiny.on_ranks(root / "two", 2, lambda rank: train_here(root / "two", rank, 2))
accumulated = {"batch_size": 2, "accumulation": 2}
tiny.on_ranks(root / "accumulated", 2, lambda rank: train_here(root / "accumulated", rank, 2, **accumulated))
(root / "up").mkdir()
train_here(root / "up", 0, 1, stop=8)
tiny.on_ranks(root / "up" / "ranks", 2, lambda rank: train_here(root / "up", rank, 2))
tiny.on_ranks(root / "down", 2, lambda rank: train_here(root / "down", rank, 2, stop=5))
train_here(root / "down", 0, 1)
tiny.on_ranks(root / "tests", 2, lambda rank: (broken(rank), everything(rank)))
"""


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny.run_script(RANKS, folder)
    return folder


def one_rank(tiny, folder, batch_size, epochs=4):
    """The same training in one process: 22 clips without batch norm and dropout; the order of clips of each step as well."""
    loaders = tiny.MemoryLoader(22, batch_size), tiny.MemoryLoader(9, train=False)
    net = tiny.make_tiny_net(with_norm=False, dropout=0.0)
    result = tiny.train_tiny(folder, net, loaders=loaders, settings={"epochs": epochs, "batch_size": batch_size})
    loader = tiny.MemoryLoader(22, batch_size)
    return result, [batch.keys for _ in range(epochs) for batch in loader]


def read_keys(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of_two(folder):
    parts = [read_keys(folder / f"train-{rank}-of-2") for rank in range(2)]
    return [own + other for own, other in zip(*parts, strict=True)]


def check_weights(folder, whole):
    weights, expected = (
        load_file(folder / "checkpoints" / whole.last_weights.parent.name / "weights.safetensors"),
        whole.last_weights,
    )
    for name, tensor in load_file(expected).items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["two", "accumulated"])
def test_two_ranks_equal_one_at_the_same_batch(tiny, ranks, tmp_path, name):
    """Twelve steps; 22 clips in 3 steps, so that the ranks' parts differ in size."""
    whole, keys = one_rank(tiny, tmp_path, batch_size=8)
    assert steps_of_two(ranks / name) == keys
    check_weights(ranks / name, whole)
    histories = [(ranks / name / f"history-{rank}-of-2").read_text() for rank in range(2)]
    assert histories[0] == histories[1]
    for epoch in whole.history:
        assert f"ledger='{epoch.ledger}'" in histories[0]
        assert f"train_loss={epoch.train_loss:.4f}"[:-1] in histories[0]


def test_one_rank_goes_on_as_two_with_the_same_clips(tiny, ranks, tmp_path):
    """Six steps an epoch, of which two of the second are done by one rank."""
    whole, keys = one_rank(tiny, tmp_path, batch_size=4)
    assert read_keys(ranks / "up" / "train-0-of-1") == keys[:8]
    assert steps_of_two(ranks / "up") == keys[8:]
    check_weights(ranks / "up", whole)
    history = (ranks / "up" / "history-1-of-2").read_text()
    assert history.count(f"ledger='{whole.history[0].ledger}'") == 4
    assert history.count("world_size=1") == 1
    assert f"train_loss={whole.history[1].train_loss:.5f}"[:-1] in history


def test_two_ranks_go_on_as_one_with_the_same_clips(tiny, ranks, tmp_path):
    """Three steps an epoch, of which two of the second are done by two ranks; one rank then needs two micro batches a step."""
    whole, keys = one_rank(tiny, tmp_path, batch_size=8)
    assert steps_of_two(ranks / "down") == keys[:5]
    assert read_keys(ranks / "down" / "train-0-of-1") == keys[5:]
    check_weights(ranks / "down", whole)
    history = (ranks / "down" / "history-0-of-1").read_text()
    assert history.count(f"ledger='{whole.history[0].ledger}'") == 4
    assert history.count("effective_batch=7.33") == 4


def test_ranks_stop_together_and_name_the_clips_of_all(ranks):
    messages = [(ranks / f"error{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("the loss of clips clip")
    assert messages[0].count("clip") >= 3
    assert "is not finite in step 0 (epoch 0)" in messages[0]
    assert not list(ranks.glob("broken/step-*"))


def test_average_and_precise_statistics_are_the_same_on_all_ranks(ranks):
    histories = [(ranks / f"everything{rank}").read_text() for rank in range(2)]
    assert histories[0] == histories[1]
    assert sorted(path.name for path in ranks.glob("everything/step-00000006/*")) == [
        "average.safetensors",
        "manifest.json",
        "optimizer.pt",
        "weights.safetensors",
    ]


def test_sums_and_ledger_of_other_ranks_are_merged_on_rank_0():
    ledger = ClipLedger().add(["a", "b"])
    progress = Progress(sums=[[1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.0, 3.0]], ledger=ledger)
    same = [SimpleNamespace(rank=rank, world_size=2) for rank in range(2)]
    assert [sums_for(run, progress) for run in same] == progress.sums
    others = [SimpleNamespace(rank=rank, world_size=3) for rank in range(3)]
    assert [sums_for(run, progress) for run in others] == [[1.5, 3.0, 4.0, 7.0], None, None]
    assert [ledger_for(run, progress) for run in others] == [ledger, ClipLedger(), ClipLedger()]
    assert gather_ledger(SimpleNamespace(world_size=1), ledger) == ledger
    assert sums_for(others[0], Progress()) is None


def test_another_effective_batch_is_another_training(tiny, tmp_path):
    tiny.train_tiny(tmp_path, should_stop=tiny.stop_after(3))
    with pytest.raises(ConfigError, match=r"train\.accumulation 1 there and 2 now"):
        tiny.train_tiny(tmp_path, settings={"accumulation": 2})
