import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from infra.errors import ConfigError, DataError, PipelineError
from infra.storage import sha256_file, sha256_json
from pipelines.training.checkpoint import Progress, load_latest_verified, prune, read_history, restore, save, verify
from pipelines.training.metrics import EpochMetrics
from preprocessing.clip_ledger import ClipLedger

IDENTITY = {"train": {"learning_rate": 0.1}, "label_passport": "00112233aabbccdd"}
FILES = ("weights.safetensors", "optimizer.pt", "manifest.json")


def history_of(*top1s):
    rest = {"train_loss": 0.1, "train_top1": 0.2, "val_loss": 0.3, "val_top5": 0.4, "learning_rate": 1 / 3, "seconds": 1.5}
    rest |= {"effective_batch": 4.0, "world_size": 1, "data_wait": 0.1, "peak_memory_bytes": 1, "ledger": "2:ff"}
    numbered = enumerate(top1s)
    return [
        EpochMetrics(epoch=i, step=10 * i + 10, val_top1=top1, clips_per_second=2.5, gammas={"3a": 0.5}, **rest)
        for i, top1 in numbered
    ]


@pytest.fixture
def trained(tiny):
    """A network and an optimiser with momentum."""
    state = tiny.tiny_state(tiny.make_tiny_net())
    batch = next(iter(tiny.MemoryLoader()))
    state.model(state.model.prepare(batch.clips)).square().sum().backward()
    state.optimizer.step()
    return state


@pytest.fixture
def folder(tmp_path, trained):
    """Checkpoints of steps 10 and 13."""
    save(tmp_path / "checkpoints", trained, Progress(epoch=1, global_step=10, history=history_of(0.5)), IDENTITY)
    sums = [[0.1, 1.0, 2.0, 3.0]]
    progress = Progress(
        epoch=1,
        step_in_epoch=3,
        global_step=13,
        steps_per_epoch=5,
        seconds=0.7,
        waited=0.2,
        sums=sums,
        ledger=ClipLedger().add(["a"]),
        history=history_of(0.5),
    )
    save(tmp_path / "checkpoints", trained, progress, IDENTITY)
    return tmp_path / "checkpoints"


def test_a_checkpoint_gives_back_every_bit(tiny, trained, folder):
    found = load_latest_verified(folder, IDENTITY)
    assert found.progress == Progress(
        epoch=1,
        step_in_epoch=3,
        global_step=13,
        steps_per_epoch=5,
        seconds=0.7,
        waited=0.2,
        sums=[[0.1, 1.0, 2.0, 3.0]],
        ledger=ClipLedger().add(["a"]),
        history=history_of(0.5),
    )
    torch.manual_seed(99)
    other = tiny.tiny_state(tiny.TinyNet())
    assert restore(found.read(), other) == found.progress
    assert all(torch.equal(tensor, other.model.state_dict()[name]) for name, tensor in trained.model.state_dict().items())
    state, other_state = trained.optimizer.state_dict(), other.optimizer.state_dict()
    assert state["param_groups"] == other_state["param_groups"]
    momenta = [entry["momentum_buffer"] for entry in state["state"].values()]
    assert len(momenta) == len(list(trained.model.parameters()))
    for entry, momentum in zip(other_state["state"].values(), momenta, strict=True):
        assert torch.equal(entry["momentum_buffer"], momentum)


def test_average_and_scaler_come_back_too(tiny, tmp_path):
    def make(scale):
        state = tiny.tiny_state(tiny.make_tiny_net())
        average = AveragedModel(state.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        return replace(state, average=average, scaler=torch.amp.GradScaler("cpu", init_scale=scale))

    written, read = make(8.0), make(2.0)
    with torch.no_grad():
        for parameter in written.average.module.parameters():
            parameter.add_(1)
    save(tmp_path, written, Progress(global_step=7), IDENTITY)
    assert sorted(load_latest_verified(tmp_path, IDENTITY).read()) == sorted([*FILES, "average.safetensors"])
    restore(load_latest_verified(tmp_path, IDENTITY).read(), read)
    assert read.scaler.get_scale() == 8.0
    assert read.average.n_averaged == 7
    for name, tensor in written.average.module.state_dict().items():
        assert torch.equal(tensor, read.average.module.state_dict()[name])


def test_the_manifest_says_what_it_is_and_is_written_last(folder):
    path = folder / "step-00000013"
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert (manifest["format_version"], manifest["global_step"], manifest["epoch"], manifest["step_in_epoch"]) == (2, 13, 1, 3)
    assert manifest["label_passport"] == IDENTITY["label_passport"]
    assert manifest["best"]["val_top1"] == 0.5
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": sha256_file(path / name)}
    newest = max(path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "manifest.json"


def test_nothing_there_is_a_new_start(tmp_path):
    assert load_latest_verified(tmp_path / "none", IDENTITY) is None
    assert read_history(tmp_path / "none") == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "flipped"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(folder, caplog, name, damage):
    file = folder / "step-00000013" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "flipped": data}[damage])
    assert load_latest_verified(folder, IDENTITY).progress.global_step == 10
    assert f"step-00000013 is damaged: {name}" in caplog.text or f"the content of {name}" in caplog.text
    assert "set aside, training goes on from step 10" in caplog.text
    assert [path.name[:21] for path in folder.glob("damaged-*")] == ["damaged-step-00000013"]
    assert load_latest_verified(folder, IDENTITY).progress.global_step == 10


def test_if_all_are_damaged_training_starts_anew_and_says_so(folder, caplog):
    for path in folder.glob("step-*"):
        (path / "manifest.json").write_bytes(b"")
    assert load_latest_verified(folder, IDENTITY) is None
    assert caplog.text.count("training goes on from step 0") == 2


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(folder, name, position, bit):
    path = folder / "step-00000013"
    intact = (path / name).read_bytes()
    before = verify(path)
    data = bytearray(intact)
    data[int(position * len(data))] ^= 1 << bit
    (path / name).write_bytes(data)
    try:
        changed = verify(path)
        assert changed == before  # an "e" that became "E" in a number says the same
    except DataError as error:
        assert "is damaged" in str(error)  # noqa: PT017
    finally:
        (path / name).write_bytes(intact)


def test_a_checkpoint_of_other_settings_is_refused_and_the_difference_named(folder):
    other = {"train": {"learning_rate": 0.2}, "label_passport": IDENTITY["label_passport"]}
    with pytest.raises(ConfigError) as error:
        load_latest_verified(folder, other)
    assert "step-00000013 belongs to another training: train.learning_rate 0.1 there and 0.2 now" in str(error.value)
    assert f"delete {folder} to train anew" in str(error.value)
    with pytest.raises(ConfigError, match="label_passport '00112233aabbccdd' there and None now"):
        load_latest_verified(folder, {"train": IDENTITY["train"]})


def test_a_checkpoint_of_another_version_is_refused_not_thrown_away(folder):
    path = folder / "step-00000013" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    manifest["format_version"] = 1
    path.write_text(json.dumps({**manifest, "sha256": sha256_json(manifest)}))
    with pytest.raises(PipelineError, match="format version 1, this program reads 2"):
        load_latest_verified(folder, IDENTITY)
    assert path.exists()


def test_what_a_killed_writer_left_is_removed(folder):
    shutil.copytree(folder / "step-00000013", folder / ".tmp-12345678-step-00000020")
    assert load_latest_verified(folder, IDENTITY).progress.global_step == 13
    assert not list(folder.glob(".tmp-*"))


def test_nothing_is_written_over(folder, trained):
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
    with pytest.raises(PipelineError, match=r"step-00000013 cannot be written: .*no other training writes"):
        save(folder, trained, Progress(global_step=13), IDENTITY)
    assert {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()} == before


def test_a_place_that_cannot_be_written_is_named(tmp_path, trained):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"file/checkpoints/step-00000001 cannot be written"):
        save(tmp_path / "file" / "checkpoints", trained, Progress(global_step=1), IDENTITY)


def test_pruning_keeps_the_two_newest_and_the_best(tmp_path, trained):
    top1s = [0.1, 0.6, 0.6, 0.2, 0.3]
    for epoch in range(len(top1s)):
        history = history_of(*top1s[: epoch + 1])
        save(tmp_path, trained, Progress(epoch=epoch + 1, global_step=10 * epoch + 10, history=history), IDENTITY)
        prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000040", "step-00000050"]
    assert read_history(tmp_path) == history_of(*top1s)


def test_the_history_is_read_past_a_torn_checkpoint(folder):
    (folder / "step-00000013" / "manifest.json").write_bytes(b"{")
    assert read_history(folder) == history_of(0.5)


def test_a_pickle_is_never_run(folder, tiny, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    files = load_latest_verified(folder, IDENTITY).read()
    torch.save({"optimizer": Payload()}, tmp_path / "payload.pt")
    files["optimizer.pt"] = (tmp_path / "payload.pt").read_bytes()
    with pytest.raises(pickle.UnpicklingError):
        restore(files, tiny.tiny_state(tiny.TinyNet()))
    assert not (tmp_path / "ran").exists()
