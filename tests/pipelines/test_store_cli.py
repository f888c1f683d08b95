"""`sagsm store`: what each command prints, and that nothing goes without --yes."""

import json
import os
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.errors import DataError
from pipelines.artifacts import Store
from pipelines.cli import app


def run(*arguments: Any) -> Any:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["store", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture
def two(tmp_path, finish):
    """Two evaluations of `demo`, the first ten days old, which share index and shards."""
    for number, seed in enumerate((0, 1)):
        finish({"train.seed": seed})
        if number == 0:
            for path in tmp_path.glob("store/*/*/artifact.json"):
                os.utime(path, (path.stat().st_mtime - 864_000,) * 2)
    return tmp_path


def test_list_says_what_is_there(two):
    with Store(two / "store").work_on("train", "f" * 16):
        lines = run("list", "--workdir", two).stdout.splitlines()
    assert lines[0].split() == ["stage", "fingerprint", "size", "age", "experiment", "MLflow", "run", "needed", "by", "state"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert "10 d" in rows["shards"]
    assert "search, train, evaluate" in rows["shards"]
    assert rows["shards"].rstrip().endswith("complete")
    assert any(f"{'f' * 16}" in line and "unfinished, in use by another process" in line for line in lines)
    assert lines[-1].startswith(f"9 in {two / 'store'}, ")
    found = json.loads(run("list", "--workdir", two, "--json").stdout)
    shards = next(item for item in found["artifacts"] if item["stage"] == "shards")
    assert (shards["experiments"], shards["is_whole"], shards["in_use_by"]) == (["demo"], True, None)
    assert sorted({stage for stage, _ in shards["needed_by"]}) == ["evaluate", "search", "train"]
    assert found["leftovers"] == found["unknown"] == []


def test_gc_tells_first_and_does_it_when_told(two):
    before = sorted(two.glob("store/*/*"))
    said = run("gc", "--keep-days", 5, "--workdir", two).stdout
    assert "would be removed" in said
    assert said.splitlines()[-1] == "next: the same command with --yes"
    assert sorted(two.glob("store/*/*")) == before
    would = json.loads(run("gc", "--keep-days", 5, "--workdir", two, "--json").stdout)
    done = json.loads(run("gc", "--keep-days", 5, "--workdir", two, "--yes", "--json").stdout)
    assert (would["done"], done["done"]) == (False, True)
    assert would["removed"] == done["removed"]
    assert sorted(item["stage"] for item in done["removed"]) == ["evaluate", "search", "train"]
    kept = sorted(item["stage"] for item in done["kept"])
    assert kept == ["evaluate", "index", "search", "shards", "train"]  # the shared ones are old, and needed
    assert run("gc", "--keep-days", 5, "--workdir", two, "--yes").stdout.splitlines()[-1] == "0 removed, 0.0 MB; 5 kept"


def test_backup_and_restore_say_what_they_did(two, tmp_path_factory):
    place = tmp_path_factory.mktemp("copy")
    said = run("backup", place, "--workdir", two).stdout.splitlines()
    assert said[0].startswith(f"{place}: 8 artifacts, 8 of them copied now, and no embedded MLflow; ")
    assert said[-1] == f"next: sagsm store restore {place} --workdir NEW"
    new = two.parent / "restored"
    said = json.loads(run("restore", place, "--workdir", new, "--json").stdout)
    assert (said["num_artifacts"], said["num_copied"], said["damaged"]) == (8, 8, [])
    [scores, _] = (place / "store" / "evaluate").glob("*/scores.parquet")
    scores.write_bytes(b"PAR1")
    result = CliRunner().invoke(app, ["store", "restore", str(place), "--workdir", str(two.parent / "other")])
    assert isinstance(result.exception, DataError)
    assert "1 artifacts are damaged and were left out: evaluate" in str(result.exception)
