"""Copies of checkpoints, on a disk and on a server that speaks S3."""

import json
import logging
import shutil
import time
from dataclasses import MISSING, fields

import pytest
import torch

from infra.errors import PipelineError
from infra.filesystems import Folder
from pipelines.training import checkpoint, checkpoint_mirror
from pipelines.training.checkpoint_mirror import CheckpointMirror, fetch, prune, upload
from pipelines.training.loop import train
from pipelines.training.metrics import EpochMetrics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint_mirror, "_SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(checkpoint_mirror, "_SECONDS_AFTER_FAILURE", 0.02)


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A place of which nothing exists yet."""
    if request.param == "local":
        return Folder(tmp_path / "mirror")
    return Folder(f"{request.getfixturevalue('s3_url')}/{tmp_path.name}")


def run(tiny, folder, epochs=3, **arguments):
    """A training with four checkpoints an epoch."""
    settings = tiny.tiny_settings(epochs=epochs, checkpoint_every_steps=1)
    return train(
        tiny.make_tiny_net(),
        tiny.MemoryLoader(),
        tiny.MemoryLoader(train=False),
        settings,
        checkpoint_dir=folder,
        device=CPU,
        **arguments,
    )


def names_at(place):
    return [entry.name for entry in place.entries() if not entry.is_folder or (place / entry.name).entries()]


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_kept_here_is_kept_there_and_another_machine_goes_on_from_it(tiny, place, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    with CheckpointMirror(here, place):
        result = run(tiny, here, epochs=3)
    newest, best = max(here.glob("step-*")), checkpoint.checkpoint_path(here, result.best.step)
    assert {newest.name, best.name} <= set(names_at(place))
    assert len(names_at(place)) <= 3
    fetch(place, there)
    assert bytes_of(there) == {path: data for path, data in bytes_of(here).items() if path.parts[0] in (newest.name, best.name)}
    again = run(tiny, there, epochs=3)
    assert again.resumed_from_step == int(newest.name[5:])
    assert again.history == result.history


def test_a_run_that_moves_to_another_machine_ends_with_the_same_bits(tiny, tmp_path):
    place = Folder(tmp_path / "mirror")
    undisturbed = run(tiny, tmp_path / "undisturbed")
    steps = iter(range(100))
    with CheckpointMirror(tmp_path / "here", place):
        first = run(tiny, tmp_path / "here", should_stop=lambda: next(steps) == 6)
    assert not first.completed
    fetch(place, tmp_path / "there")
    with CheckpointMirror(tmp_path / "there", place):
        second = run(tiny, tmp_path / "there")
    assert second.resumed_from_step == 7
    assert second.last_weights.read_bytes() == undisturbed.last_weights.read_bytes()


def test_the_manifest_goes_up_last_and_a_copy_without_one_is_none(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path / "here", epochs=1)
    path = max((tmp_path / "here").glob("step-*"))
    place = Folder(tmp_path / "mirror")
    monkeypatch.setattr(Folder, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        upload(path, place)
    monkeypatch.undo()
    assert set((place / path.name).list()) == set(json.loads((path / "manifest.json").read_bytes())["files"])
    fetch(place, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    upload(path, place)
    fetch(place, tmp_path / "there")
    assert [found.name for found in (tmp_path / "there").iterdir()] == [path.name]


def test_pruning_keeps_the_two_newest_whole_ones_and_the_best(tmp_path):
    place = Folder(tmp_path)
    for step in range(10, 70, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "weights.safetensors").write_bytes(b"x")
        if step != 50:
            (tmp_path / f"step-{step:08d}" / "manifest.json").write_bytes(b"{}")
    names = [field.name for field in fields(EpochMetrics) if field.default is MISSING and field.default_factory is MISSING]
    history = [
        EpochMetrics(**dict.fromkeys(names, 1.0) | {"epoch": i, "step": step, "val_top1": top1})
        for i, (step, top1) in enumerate({10: 0.1, 20: 0.9, 30: 0.9, 40: 0.2}.items())
    ]
    prune(place, {"history": [metrics.to_json() for metrics in history]})
    assert names_at(place) == ["step-00000020", "step-00000040", "step-00000060"]


@pytest.mark.parametrize("damage", ["flip", "remove", "all"])
def test_a_damaged_copy_gives_way_to_the_one_before(tiny, place, tmp_path, caplog, damage):
    with CheckpointMirror(tmp_path / "here", place):
        run(tiny, tmp_path / "here", epochs=2)
    names = names_at(place)
    for name in names if damage == "all" else names[-1:]:
        data = bytearray((place / name).read_bytes("weights.safetensors"))
        data[len(data) // 2] ^= 1
        if damage == "remove":
            (place / name).delete("weights.safetensors")
        else:
            (place / name).write_bytes("weights.safetensors", bytes(data))
    if damage == "all":
        with pytest.raises(PipelineError, match=rf"all {len(names)} checkpoints at {place} are damaged; delete them"):
            fetch(place, tmp_path / "there")
        return
    fetch(place, tmp_path / "there")
    assert max((tmp_path / "there").glob("step-*")).name == names[-2]
    assert f"{place}/{names[-1]} cannot be used: " in caplog.text
    assert not list((tmp_path / "there").glob(".tmp-*"))


def test_the_newer_of_here_and_there_is_taken(tiny, tmp_path):
    place = Folder(tmp_path / "mirror")
    with CheckpointMirror(tmp_path / "here", place):
        run(tiny, tmp_path / "here", epochs=1)
    shutil.copytree(tmp_path / "here", tmp_path / "behind")
    with CheckpointMirror(tmp_path / "here", place):
        run(tiny, tmp_path / "here", epochs=1)
    before = bytes_of(tmp_path / "here")
    fetch(place, tmp_path / "here")
    assert bytes_of(tmp_path / "here") == before
    shutil.rmtree(max((tmp_path / "behind").glob("step-*")))
    fetch(place, tmp_path / "behind")
    assert max((tmp_path / "behind").glob("step-*")).name == max((tmp_path / "here").glob("step-*")).name


def test_a_place_that_is_away_for_a_while_costs_nothing_but_a_warning(tiny, tmp_path, caplog):
    """The folder above is a file at first, as a disk that is not mounted."""
    blocker = tmp_path / "mount"
    blocker.write_text("")
    place = Folder(blocker / "mirror")

    def mount(metrics):
        wait_for(lambda: "could not be copied" in caplog.text)
        if blocker.is_file():
            blocker.unlink()

    with caplog.at_level(logging.WARNING), CheckpointMirror(tmp_path / "here", place):
        run(tiny, tmp_path / "here", epochs=2, on_epoch=mount)
    assert f"could not be copied to {place}" in caplog.text
    assert names_at(place)[-1] == max((tmp_path / "here").glob("step-*")).name


def test_a_place_that_stays_away_is_an_error_at_the_end_and_nothing_is_lost(tiny, tmp_path, s3_url, monkeypatch):
    """A bucket that does not exist: the same error as that of a server that refuses."""
    place = Folder("s3://nobodys-bucket/x")
    with pytest.raises(PipelineError) as error, CheckpointMirror(tmp_path / "here", place):
        result = run(tiny, tmp_path / "here", epochs=1)
    assert result.completed
    assert f"the last checkpoint could not be copied to {place}: " in str(error.value)
    assert f"It is safe in {tmp_path / 'here'}; run again" in str(error.value)
    again = Folder(tmp_path / "other")
    with CheckpointMirror(tmp_path / "here", again):
        assert run(tiny, tmp_path / "here", epochs=1).resumed_from_step == result.history[-1].step
    assert names_at(again)


def test_a_place_that_cannot_be_read_at_the_start(tiny, tmp_path, caplog):
    (tmp_path / "mount").write_text("")
    place = Folder(tmp_path / "mount" / "mirror")
    with pytest.raises(PipelineError, match=rf"cannot look for checkpoints at {place}: .*; check train\.checkpoints"):
        fetch(place, tmp_path / "none")
    run(tiny, tmp_path / "here", epochs=1)
    fetch(place, tmp_path / "here")
    assert f"cannot look for newer checkpoints at {place}" in caplog.text


def test_a_training_error_is_not_hidden_by_an_error_of_the_copy(tiny, tmp_path):
    run(tiny, tmp_path / "here", epochs=1)
    with pytest.raises(PipelineError, match="the loss is not finite"), CheckpointMirror(tmp_path / "here", Folder("/proc/x")):
        raise PipelineError("the loss is not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
