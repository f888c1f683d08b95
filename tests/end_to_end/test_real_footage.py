"""The whole DAG on real footage in the layouts of both datasets."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2800)]

SAGSM = str(Path(sys.executable).with_name("sagsm"))
FOOTAGE = Path(__file__).resolve().parents[3] / "shared" / "data" / "real_mini"
needs_footage = pytest.mark.skipif(not FOOTAGE.is_dir(), reason="the real footage is not on this machine")


def run(experiment, root, workdir):
    arguments = ["run", experiment, "--set", f"dataset.root={root}", "--workdir", str(workdir), "--json"]
    done = subprocess.run([SAGSM, *arguments], capture_output=True, text=True, timeout=2700, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {stage["status"] for stage in document["stages"]} == {"ran"}
    shards = next(Path(stage["path"]) for stage in document["stages"] if stage["name"] == "shards")
    return document["results"], pq.read_table(shards / "ledger.parquet").to_pylist()


@needs_footage
def test_something_v1(tmp_path):
    results, ledger = run("something_v1_smoke", FOOTAGE / "something_v1", tmp_path)
    assert {row["video_id"] for row in ledger} == {
        path.name for path in (FOOTAGE / "something_v1" / "20bn-something-something-v1").iterdir()
    }
    assert {row["status"] for row in ledger} <= {"kept", "rejected"}
    assert len(ledger) == 40 + 17 + 8
    assert 0 <= results["top1"] <= results["top5"] <= 1


@pytest.mark.long
@needs_footage
def test_diving48_is_learned(tmp_path):
    results, ledger = run("diving48_smoke", FOOTAGE / "diving48", tmp_path)
    assert sorted(row["video_id"] for row in ledger) == sorted(path.stem for path in (FOOTAGE / "diving48" / "rgb").iterdir())
    assert {row["status"] for row in ledger} <= {"kept", "rejected"}
    assert results["top1"] >= 0.80  # a plain loop at 96 px, 4 segments reached 1.0 in 24 epochs; chance is 1/12
