from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from infra.tracking import Tracker
from infra.tracking_run import TrackedRun
from infra.tracking_spool import Entry, Spool


def test_nothing_is_asked_of_the_server_but_all_is_kept_in_order(tmp_path: Path) -> None:
    taken: list[Entry] = []

    def send(entries: Sequence[Entry]) -> int:
        taken.extend(entries)
        return len(entries)

    spool = Spool(tmp_path, send, "it")
    ids: dict[str, str] = {}
    run = TrackedRun("local-1", "train", spool, ids)
    assert run.run_id == "local-1"
    run.log_metrics({"train/loss": 1.0, "val/top1": float("nan")}, step=2)
    ids["local-1"] = "abc"
    run.set_tags({"stage": "train"})
    run.finish("KILLED")
    run.finish("FINISHED")
    spool.close(5)
    assert [(entry["do"], entry["run"]) for entry in taken] == [("metrics", "local-1"), ("tags", "abc"), ("finish", "abc")]
    assert (taken[0]["values"], taken[0]["step"], taken[2]["status"]) == ({"train/loss": 1.0}, 2, "KILLED")


def test_a_run_keeps_params_metrics_tags_inputs_and_files(tracker: Tracker, tmp_path: Path) -> None:
    picture = tmp_path / "confusion.png"
    picture.write_bytes(b"png")
    with tracker.start_run("train p01", tags={"stage": "train"}) as run:
        run.log_params(
            {"train": {"learning_rate": 0.01, "slots": ["3a", "4e"]}, "root": tmp_path, "long": "x" * 999, "none": None}
        )
        run.log_metrics({"train/loss": 2.0, "val/top1": 0.25}, step=3)
        run.log_text("seed: 0\n", "conf/config.yaml")
        run.log_json({"b": 1, "a": [2]}, "tables/summary.json")
        run.log_file(picture, "figures")
        run.log_dataset("diving48", "f" * 64, str(tmp_path), "train")
        run.describe("**top-1 0.25**" + "x" * 9000)
    stored = tracker._client.get_run(run.run_id)
    params = stored.data.params
    assert params["train.learning_rate"] == "0.01"
    assert params["train.slots"] == "3a,4e"
    assert (params["root"], params["none"]) == (str(tmp_path), "None")
    assert params["long"].endswith("x...")
    assert len(params["long"]) < 250
    assert stored.data.metrics == {"train/loss": 2.0, "val/top1": 0.25}
    tags = stored.data.tags
    assert (tags["stage"], tags["mlflow.source.name"]) == ("train", "sagsm")
    assert len(tags["mlflow.note.content"]) == 8000
    assert tags["mlflow.user"]
    (dataset_input,) = stored.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.dataset.digest) == ("diving48", "f" * 36)
    assert [(tag.key, tag.value) for tag in dataset_input.tags] == [("mlflow.data.context", "train")]
    files = tmp_path / "artifacts" / run.run_id / "artifacts"
    assert (files / "conf/config.yaml").read_text() == "seed: 0\n"
    assert (files / "figures/confusion.png").read_bytes() == b"png"
    assert (files / "tables/summary.json").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert stored.info.status == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")])
def test_an_error_ends_the_run_and_goes_on_up(tracker: Tracker, error: type[BaseException], status: str) -> None:
    run = tracker.start_run("train")
    with pytest.raises(error), run:
        raise error
    assert tracker._client.get_run(run.run_id).info.status == status


def test_the_first_error_is_not_hidden_by_a_lost_database(tracker: Tracker, tmp_path: Path) -> None:
    def lose_the_database_and_fail() -> None:
        with tracker.start_run("train"):
            (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        lose_the_database_and_fail()


def test_the_first_status_stays(tracker: Tracker) -> None:
    with tracker.start_run("trial") as run:
        run.finish("KILLED")
    assert tracker._client.get_run(run.run_id).info.status == "KILLED"


def test_only_finite_metrics_are_kept_and_large_batches_are_split(tracker: Tracker) -> None:
    with tracker.start_run("train") as run:
        run.log_metrics({"train/loss": float("nan"), "train/lr": float("inf"), "val/top1": 0.5})
        run.log_metrics({f"gamma/{index}": float(index) for index in range(1001)}, step=1)
        run.log_params({f"p{index}": index for index in range(101)})
    stored = tracker._client.get_run(run.run_id).data
    assert "train/loss" not in stored.metrics
    assert "train/lr" not in stored.metrics
    assert len(stored.metrics) == 1002
    assert len(stored.params) == 101


def test_an_image_that_is_sent_twice_is_there_once(tracker: Tracker, tmp_path: Path) -> None:
    """As a full picture and a small copy, named as MLflow's page expects them."""
    picture = tmp_path / "map.png"
    Image.new("RGB", (900, 600), "white").save(picture)
    sent: list[Entry] = []
    send = tracker._spool._send
    tracker._spool._send = lambda entries: (sent.extend(entries), send(entries))[1]
    with tracker.start_run("insight") as run:
        run.log_image(picture, "features/map")
        run.log_image(picture, "features/map", step=1)
    (entry, _) = [entry for entry in sent if entry["do"] == "image"]
    folder = tmp_path / "artifacts" / run.run_id / "artifacts" / "images"
    once = sorted(path.name for path in folder.iterdir())
    assert [name.partition("+timestamp")[0] for name in once] == [f"features~map+step+{step}" for step in (0, 0, 1, 1)]
    assert sorted(Path(name).suffix for name in once) == [".png", ".png", ".webp", ".webp"]
    tracker._sender.send([entry])
    assert sorted(path.name for path in folder.iterdir()) == once
    assert tracker._client.get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"
