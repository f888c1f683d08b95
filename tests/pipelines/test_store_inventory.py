import json
import os

from pipelines.artifacts import Provenance, Store
from pipelines.leases import lease, leased
from pipelines.store_inventory import measure, needs, outside_of, take_inventory


def commit(store, stage, fingerprint, *, inputs=None, experiment="demo", config=None, age=0):
    with store.work_on(stage, fingerprint) as partial:
        (partial / "data").write_bytes(b"12345")
        extra = {"experiment": experiment, "variant": "", "summary": {}, "mlflow_run_id": f"run-{fingerprint}"}
        made = store.commit(partial, Provenance(stage, 1, config or {}, inputs or {}), fingerprint, extra)
    manifest = made.path / "artifact.json"
    os.utime(manifest, (manifest.stat().st_mtime - age,) * 2)
    return made


def test_an_inventory_says_who_made_what_and_what_needs_it(tmp_path):
    store = Store(tmp_path)
    commit(store, "shards", "5" * 16, config={"shards": {"output": "s3://bucket/sets"}}, age=20)
    commit(
        store, "train", "1" * 16, inputs={"shards": "5" * 16}, config={"train": {"checkpoints": str(tmp_path / "c")}}, age=10
    )
    commit(store, "compare", "2" * 16, inputs={"train:gsm:s0": "1" * 16}, experiment="compare")
    with lease(store.root, [("train", "1" * 16)], "a test"):
        found = take_inventory(store, leased(store.root))
    shards, train, compare = found.items
    assert [item.stage for item in found.items] == ["shards", "train", "compare"]
    assert found.experiments() == {shards.key: ["compare", "demo"], train.key: ["compare", "demo"], compare.key: ["compare"]}
    assert found.needed_by()[shards.key] == [train]
    assert needs(found.items, [compare.key]) == {shards.key, train.key, compare.key}
    assert needs(found.items, [train.key]) == {shards.key, train.key}
    assert shards.outside == (f"s3://bucket/sets/{'5' * 16}",)
    assert train.outside == (str(tmp_path / "c" / ("1" * 16)),)
    assert (shards.state, shards.mlflow_run_id) == ("complete", f"run-{'5' * 16}")
    assert train.state.startswith("complete, in use by a test (")
    assert shards.num_bytes == 5 + (shards.path / "artifact.json").stat().st_size
    assert found.num_bytes == sum(item.num_bytes for item in found.items)


def test_damaged_unfinished_and_unreadable_are_told_apart(tmp_path):
    store = Store(tmp_path)
    (commit(store, "train", "1" * 16).path / "data").write_bytes(b"1")
    (commit(store, "train", "2" * 16).path / "artifact.json").write_text("{")
    with store.work_on("train", "3" * 16) as partial:
        (partial / "half").write_bytes(b"1")
        partial.with_suffix(".run").write_text(
            json.dumps({"run_id": "r", "experiment": "demo", "inputs": {"shards": "5" * 16}})
        )
        by_name = {item.fingerprint[0]: item for item in take_inventory(store, {}).items}
        assert by_name["3"].state == "unfinished, in use by another process"
    with store.work_on("train", "4" * 16):
        pass
    by_name = {item.fingerprint[0]: item for item in take_inventory(store, {}).items}
    assert by_name["1"].state == "data has 1 bytes in the store, 5 were written"
    assert "is not a readable manifest" in by_name["2"].state
    assert [by_name[name].is_readable for name in "1234"] == [True, False, True, True]
    assert (by_name["3"].state, by_name["3"].inputs, by_name["3"].mlflow_run_id) == (
        "unfinished",
        (("shards", "5" * 16),),
        "r",
    )
    assert (by_name["4"].state, by_name["4"].experiment) == ("unfinished", "")


def test_what_killed_programs_left_and_what_is_not_ours(tmp_path):
    store = Store(tmp_path)
    commit(store, "train", "1" * 16)
    folder = tmp_path / "train"
    removed = folder / f"{'7' * 16}.removed-1"
    removed.mkdir()
    (removed / "artifact.json").write_text(json.dumps({"config": {"train": {"checkpoints": "s3://bucket/c"}}}))
    (folder / f"{'8' * 16}.damaged-9").mkdir()
    (folder / f"{'9' * 16}.lock").touch()
    (folder / "1111-healed").mkdir()
    (tmp_path / "empty").mkdir()
    found = take_inventory(store, {})
    assert [leftover.path.name[:18] for leftover in found.leftovers] == [f"{'7' * 16}.r", f"{'8' * 16}.d", f"{'9' * 16}.l"]
    assert [path.name for path in found.unknown] == ["1111-healed"]
    assert outside_of(removed) == (f"s3://bucket/c/{'7' * 16}",)
    assert outside_of(folder / ("1" * 16)) == ()


def test_a_store_that_is_not_there_is_empty(tmp_path):
    assert take_inventory(Store(tmp_path / "store"), leased(tmp_path / "store")).items == ()
    assert measure(tmp_path / "store") == (0, 0.0)
    assert list(tmp_path.iterdir()) == []
