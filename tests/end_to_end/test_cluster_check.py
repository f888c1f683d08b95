"""`sagsm cluster check` and `sagsm run --address` on a cluster of five nodes, four of which are each wrong in their own ways.

All are real: their processes have an environment, a mount namespace or a clock of their own.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cluster import PACKAGES, checkout
from infra.errors import ClusterError
from pipelines.cli import app
from preprocessing.decode import ffmpeg_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),  # of Ray's nodes
]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
RAY = Path(sys.executable).with_name("ray")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
WRONG = {
    "good": [],
    "old": ["ray", "torch"],
    "bare": ["ffmpeg"],
    "stale": ["code"],
    "late": ["clock"],
    "apart": ["free disk", "store"],
}


def pretend(folder, **versions):
    """A folder for PYTHONPATH in which other versions of packages are installed."""
    for package, other in versions.items():
        place = folder / f"{package}-{other}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {other}\n")
    return {"PYTHONPATH": str(folder)}


def without_ffmpeg(folder):
    """No ffmpeg on PATH, and the package that brings one as it is where there is none for the machine."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "bash").symlink_to(shutil.which("bash"))  # Ray starts workers by it
    package = Path(find_spec("imageio_ffmpeg").origin).parent
    shutil.copytree(package, folder / "imageio_ffmpeg", ignore=shutil.ignore_patterns("ffmpeg-*", "__pycache__"))
    return {"PATH": str(folder / "bin"), "PYTHONPATH": str(folder)}


def with_old_code(folder):
    """A copy of the packages from another day, which comes first wherever Python looks for modules."""
    for package in PACKAGES:
        shutil.copytree(checkout() / package, folder / "old" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "old/models/temporal/gate_shift.py").open("a") as file:
        file.write("# as it was\n")
    (folder / "old/infra/links.py").unlink()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(folder / 'old')!r})\n")
    return {"PYTHONPATH": str(folder)}


def five_minutes_ahead(folder):
    """For tasks: the shell by which Ray starts workers gives them another clock, with which Ray's own server would hang.

    libfaketime refuses the call that Python sleeps by, so that these sleep by another.
    """
    folder.mkdir()
    shell, clock = folder / "bash", f"LD_PRELOAD={FAKETIME} FAKETIME=+5m FAKETIME_DONT_FAKE_MONOTONIC=1"
    shell.write_text(f'#!/bin/sh\n{clock} exec {shutil.which("bash")} "$@"\n')
    shell.chmod(0o755)
    (folder / "sitecustomize.py").write_text("import select, time\ntime.sleep = lambda s: select.select([], [], [], s)\n")
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}


def start_apart(address, folder, work):
    """A node that has a disk of its own, and a tiny one, where the others have the work directory."""
    own = folder / "disk"
    own.mkdir(parents=True)
    script = 'mount -t tmpfs -o size=8m tmpfs "$1" && mount -t tmpfs -o size=8m tmpfs "$2" && shift 2 && exec "$@"'
    ray = [RAY, "start", f"--address={address}", "--node-name=apart", "--num-cpus=1", "--object-store-memory=80000000"]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", work, own, *ray, "--block"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, "TMPDIR": str(own)}, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Work directory, raw videos, and the rest."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("work", "raw/wave"):
        (folder / name).mkdir(parents=True)
    (folder / "raw/wave/0.mp4").write_bytes(b"0123")
    return folder


@pytest.fixture(scope="module")
def broken_cluster(places, monkeypatch_module):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    if not FAKETIME.exists() or os.geteuid() != 0:
        pytest.skip("needs root, for a mount namespace, and the Debian package faketime")
    monkeypatch_module.setenv("RAY_raylet_start_wait_time_s", "120")  # on a busy machine a node may need so long
    made = Cluster(initialize_head=True, head_node_args={**NODE, "node_name": "good"})
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # else every `ray.init()` on this machine joins this cluster
    apart = None
    try:
        variables = {
            "old": pretend(places / "old", ray="2.9.3", torch="2.1.0"),
            "bare": without_ffmpeg(places / "bare"),
            "stale": with_old_code(places / "stale"),
            "late": five_minutes_ahead(places / "late"),
        }
        for name, env_vars in variables.items():
            made.add_node(wait=False, **NODE, node_name=name, env_vars=env_vars)
        # Last, since two that start at one time may take one name for their sockets, of which one dies.
        apart = start_apart(made.address, places / "apart", places / "work")
        deadline = time.monotonic() + 120
        while len(made.global_state._live_node_ids()) < len(WRONG):
            assert time.monotonic() < deadline, (places / "apart/log").read_text()
            time.sleep(0.1)
        yield made.address
    finally:
        ray.shutdown()
        if apart is not None:
            apart.terminate()
            apart.wait(60)
        made.shutdown()


@pytest.fixture(scope="module")
def report(broken_cluster, places):
    """What `--json` says, by node."""
    where = ["--address", broken_cluster, "--workdir", str(places / "work")]
    what = ["--experiment", "folder", "--set", f"dataset.root={places / 'raw'}"]
    done = CliRunner().invoke(app, ["cluster", "check", *where, *what, "--json"])
    assert done.exit_code == 2, done.output
    document = json.loads(done.stdout)
    assert not document["fit"]
    return {node["name"]: node for node in document["nodes"]}


def breaking(node):
    return {finding["check"]: finding["text"] for finding in node["findings"] if finding["breaks"]}


def test_each_node_has_what_was_done_to_it_and_nothing_else(report, places):
    assert {name: sorted(breaking(node)) for name, node in report.items()} == {"this process": []} | WRONG
    assert list((places / "work").iterdir()) == []


def test_another_ray_and_another_torch(report):
    found = breaking(report["old"])
    assert f"has ray 2.9.3, this process {version('ray')}; install it there: pip install ray==2." in found["ray"]
    assert f"has torch 2.1.0, this process {version('torch')}; install it there: pip install torch==2." in found["torch"]


def test_no_ffmpeg(report):
    assert "no ffmpeg program was found" in breaking(report["bare"])["ffmpeg"]
    assert report["good"]["facts"]["ffmpeg"] == [ffmpeg_version(), ""]


def test_a_store_that_the_node_does_not_see(report, places):
    text = breaking(report["apart"])["store"]
    assert f"does not share the store {places / 'work/store'}: there is no such folder; mount one folder there" in text


def test_no_free_disk(report, places):
    assert f"8 MB are free in {places / 'apart/disk'}; expected 200 MB" in breaking(report["apart"])["free disk"]


def test_a_clock_five_minutes_ahead(report):
    clock = report["late"]["clock"]
    assert abs(clock["ahead_seconds"] - 300) <= clock["error_seconds"] + 0.5
    assert "s ahead of that of this process; let both keep time by NTP" in breaking(report["late"])["clock"]
    clock = report["good"]["clock"]
    assert abs(clock["ahead_seconds"]) <= clock["error_seconds"] + 0.01


def test_stale_code(report, places):
    text = breaking(report["stale"])["code"]
    assert f"imports other code than {checkout()}: 2 of " in text
    assert f"(infra/links.py, models/temporal/gate_shift.py), from {places / 'stale/old'}; look for an old copy" in text


def test_a_run_refuses_with_the_same_messages(broken_cluster, report, places):
    done = CliRunner().invoke(app, ["run", "demo", "--address", broken_cluster, "--workdir", str(places / "work")])
    assert isinstance(done.exception, ClusterError), done.output
    lines = str(done.exception).splitlines()
    assert lines[0].startswith(f"the cluster at {broken_cluster} is not fit for this run (`sagsm cluster check` shows more):")
    expected = [f"  {name}: {text}" for name, node in report.items() for text in breaking(node).values()]
    without_seconds = [line.partition(" its clock is ")[0] for line in lines[1:]]
    assert without_seconds == [line.partition(" its clock is ")[0] for line in expected]
    assert not list((places / "work/store").glob("*/*/artifact.json"))
