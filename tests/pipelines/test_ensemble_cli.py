"""`sagsm ensemble`: what it prints, that it needs no engine, and that user errors are one message with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from infra.errors import ConfigError
from infra.storage import write_json
from pipelines.artifacts import FORMAT_VERSION
from pipelines.cli import app
from pipelines.evaluation.evaluate import Scores
from pipelines.evaluation.scores import Origin, read_scores

SAGSM = str(Path(sys.executable).with_name("sagsm"))
NAMES = ("up", "down", "moving left", "moving right")


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Three networks that each see something of 60 clips."""
    labels = np.arange(60) % 4
    paths = []
    for seed in range(3):
        logits = np.random.default_rng(seed).normal(size=(60, 4)) + 1.2 * np.eye(4)[labels]
        path = tmp_path / "store" / "evaluate" / (str(seed) * 16) / "scores.parquet"
        path.parent.mkdir(parents=True)
        Scores([f"v{row}" for row in range(60)], labels, logits.astype(np.float32)).save(path, Origin(NAMES, "test", "centre"))
        write_json(path.with_name("artifact.json"), {"format_version": FORMAT_VERSION, "files": {}})
        paths.append(str(path))
    return paths


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ensemble", *map(str, arguments)])


def test_the_table_has_each_member_and_the_ensemble_is_better(runs: list[str], tmp_path: Path) -> None:
    result = invoke(*runs, "--weights", "2,1,1", "--output", tmp_path / "mean.parquet")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [line.split() for line in result.stdout.splitlines() if "%" in line and " to " in line]
    assert [row[0] for row in rows] == [*runs, "ensemble"]
    assert [row[2] for row in rows[:3]] == ["2", "1", "1"]
    assert "60 test clips of 4 classes" in result.stdout
    assert f"scores:    {tmp_path / 'mean.parquet'}" in result.stdout
    document = json.loads(invoke(*runs, "--weights", "2,1,1", "--json").stdout)
    assert document["ensemble"]["top1"] > max(row["top1"] for row in document["members"])
    assert document["ensemble"]["left_right"]["num_clips"] == 30
    assert read_scores(tmp_path / "mean.parquet").summarise().items() <= document["ensemble"].items()


def test_an_ensemble_can_be_a_member_and_a_fingerprint_names_one(runs: list[str], tmp_path: Path) -> None:
    assert invoke(*runs[:2], "--output", tmp_path / "two.parquet").exit_code == 0
    result = invoke(tmp_path / "two.parquet", "2" * 16, "--weights", "2,1", "--workdir", tmp_path, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    nested, flat = json.loads(result.stdout)["ensemble"], json.loads(invoke(*runs, "--json").stdout)["ensemble"]
    assert nested["loss"] == pytest.approx(flat["loss"], rel=1e-12)
    assert nested["confusion"] == flat["confusion"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "1,x,1"], "--weights got '1,x,1'; expected numbers with commas"),
        (["--weights", "1,1"], "expected 3 numbers above 0, one for each set of scores"),
        (["--output", "/nowhere/mean.parquet"], "there is no folder /nowhere; make it first"),
        (["nothing"], "'nothing' is no evaluation in"),
    ],
)
def test_user_errors(runs: list[str], more: list[str], message: str) -> None:
    result = invoke(*runs, *more)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_it_needs_no_engine_and_a_wrong_file_is_exit_code_2(runs: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from pipelines.cli import app\n"
        f"try: app(['ensemble', *{runs!r}])\n"
        "except SystemExit: pass\n"
        "assert not {'ray', 'mlflow', 'torch', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    (tmp_path / "text.parquet").write_text("no parquet")
    done = subprocess.run([SAGSM, "ensemble", runs[0], tmp_path / "text.parquet"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'text.parquet'} cannot be read as scores")
    assert "Traceback" not in done.stderr
