"""The whole pipeline on hosts of their own: with shards and checkpoints in S3, and MLflow with PostgreSQL.

Then the same with everything going wrong that an operator fears, hosts that come and go, and a neighbour who has no token.
"""

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.storage import sha256_file
from tests.hosts.conftest import BIN, GCS_PORT, MLFLOW_PORT, Site, wait_until
from tests.hosts.network import Host

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3000)]

SETTINGS = {
    "dataset.synthetic.num_train": 48,
    "dataset.synthetic.num_validation": 16,
    "dataset.synthetic.num_broken": 2,
    "shards.max_bad_fraction": 0.1,
    "shards.videos_per_shard": 8,
    "search.num_trials": 2,
    "search.max_epochs": 1,
    "search.subset": 16,
    "train.epochs": 8,
    "train.warmup_epochs": 1,
    "train.num_segments": 2,
    "train.pixels": 48,
    "train.batch_size": 8,
    "train.num_workers": 2,
    "train.checkpoint_every_steps": 1,
    "train.precision": "fp32",
}
STEPS_PER_EPOCH = 3  # with two workers
WORKER = "ray::RayTrainWorker"
NAMES = ("train/loss", "train/top1", "train/lr", "val/loss", "val/top1", "val/top5", "work/ledger")
NEIGHBOUR = Path(__file__).with_name("neighbour.py")
# What Ray's dashboard and its agents show to everybody, by port: an empty page and signs of life.
SIGNS_OF_LIFE = {"get /api/healthz", "get /api/local_raylet_healthz"}
PUBLIC = {
    8265: SIGNS_OF_LIFE | {"get /", "get /favicon.ico", "get /api/authentication_mode", "get /api/gcs_healthz"},
    52365: SIGNS_OF_LIFE,
}


@dataclass
class Run:
    """One `sagsm run demo` on the head.

    Attributes:
        name: of its work directory, its MLflow experiment and its places in the bucket.
    """

    site: Site
    name: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def workdir(self) -> Path:
        return self.site.shared / self.name

    @property
    def log(self) -> str:
        return (self.site.head.folder / f"{self.name}.log").read_text()

    def start(self, *options: str, **changes: object) -> "Run":
        places = {
            "shards.output": f"s3://bucket/{self.name}/shards",
            "train.checkpoints": f"s3://bucket/{self.name}/checkpoints",
        }
        settings = [word for item in {**SETTINGS, **places, **changes}.items() for word in ("--set", f"{item[0]}={item[1]}")]
        address = ["--address", f"{self.site.head.address}:{GCS_PORT}", "--workdir", self.workdir]
        self.process = self.site.head.start(BIN / "sagsm", "run", "demo", *address, *options, *settings, log=f"{self.name}.log")
        return self

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        def is_over() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the pipeline ended before {what}:\n{self.log}"
            return condition()

        wait_until(is_over, what, 600)

    def wait_for_steps(self, count: int) -> None:
        """Until so many more steps have their checkpoint."""
        first = self.newest_step()
        self.wait_for(lambda: self.newest_step() >= first + count, f"step {first + count}")

    def newest_step(self) -> int:
        folders = (self.workdir / "store" / "train").glob("*.partial/checkpoints/step-*")
        return max((int(folder.name.split("-")[1]) for folder in folders), default=0)

    def end(self) -> None:
        assert self.process is not None
        assert self.process.wait(timeout=1200) == 0, self.log

    def artifact(self, stage: str) -> Path:
        (found,) = [path.parent for path in (self.workdir / "store" / stage).glob("*/artifact.json")]
        return found

    def weights(self) -> dict[str, str]:
        """Hashes of the networks that the training has left."""
        return {path.name: sha256_file(path) for path in self.artifact("train").rglob("*.safetensors")}

    def shards(self) -> dict[str, str]:
        """Hashes of the shards in the bucket, by name."""
        done = self.site.head.run(sys.executable, "-c", _HASHES, f"{self.name}/shards")
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout)
        return found

    def metrics(self, *names: str) -> list[list[str]]:
        """Name, step and value of what the training has recorded in PostgreSQL; by default of all that no clock decides."""
        run = json.loads((self.artifact("train") / "artifact.json").read_bytes())["mlflow_run_id"]
        keys = ", ".join(f"'{name}'" for name in names or NAMES)
        query = f"select key, step, value from metrics where run_uuid = '{run}' and key in ({keys}) order by 1, 2, 3"
        return list(csv.reader(io.StringIO(self.site.ask_database(query))))

    def ledgers(self) -> list[str]:
        """A digest of the clips of each epoch, in order of the epochs."""
        return [value for _, _, value in self.metrics("work/ledger")]


_HASHES = """
import boto3, hashlib, json, sys
bucket, prefix = boto3.resource("s3").Bucket("bucket"), sys.argv[1]
objects = [found for found in bucket.objects.filter(Prefix=prefix) if found.key.endswith(".tar")]
print(json.dumps({found.key.rpartition("/")[2]: hashlib.sha256(found.get()["Body"].read()).hexdigest() for found in objects}))
"""


def tried_by(stranger: Host, hosts: Iterable[Host], pattern: str = "") -> list[list]:
    """What a program on `stranger` without a token gets from all ports of `hosts`."""
    targets = [[host.address, port] for host in hosts for port in host.listening()]
    done = stranger.run(sys.executable, NEIGHBOUR, json.dumps(targets), pattern, timeout=900)
    assert done.returncode == 0, done.stderr
    answers: list[list] = json.loads(done.stdout)
    return [answer for answer in answers if answer[2] not in PUBLIC.get(answer[1], ())]


def submitted_by(stranger: Host, host: Host) -> str:
    """What a Ray job prints that `stranger` asks the dashboard of `host` to run."""
    job = ["job", "submit", "--address", f"http://{host.address}:8265", "--", "expr", "1000003", "+", "4"]
    done = stranger.run(BIN / "ray", *job, timeout=300)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> tuple[Run, list[list]]:
    """The run, and what a neighbour got who tried all ports while it trained."""
    neighbour = site.network.add("neighbour")
    run = Run(site, "undisturbed").start()
    run.wait_for(lambda: run.newest_step() > 0, "the first step")
    got = tried_by(neighbour, [host for host in site.network.hosts.values() if host is not neighbour])
    assert run.newest_step() < SETTINGS["train.epochs"] * STEPS_PER_EPOCH, "the neighbour came too late"
    run.end()
    return run, got


def test_the_pipeline_runs_on_hosts_with_its_shards_and_checkpoints_in_a_bucket(undisturbed, site):
    run, _ = undisturbed
    stages = {path.parent.parent.name for path in (run.workdir / "store").glob("*/*/artifact.json")}
    assert stages == {"index", "shards", "audit", "search", "train", "evaluate", "insight", "report"}
    assert len(run.shards()) == 9  # 64 videos, 8 a shard, of two splits, and those of the split that lost two
    assert not list(run.workdir.rglob("*.tar"))
    keys = site.head.run(sys.executable, "-c", _KEYS, f"{run.name}/checkpoints").stdout
    assert "step-" in keys
    assert [int(step) for name, step, _ in run.metrics() if name == "val/top1"] == list(range(SETTINGS["train.epochs"]))
    assert len(set(run.ledgers())) == 1  # each epoch has shown each clip once
    assert f"\nMLflow:    http://{site.tracking.address}:{MLFLOW_PORT}/#/experiments/" in run.log
    assert f"--address {site.head.address}:{GCS_PORT}" in run.log.rpartition("\nnext:")[2]


_KEYS = """
import boto3, sys
print(*(found.key for found in boto3.resource("s3").Bucket("bucket").objects.filter(Prefix=sys.argv[1])), sep="\\n")
"""


def test_a_neighbour_without_a_token_gets_nothing_from_any_port(undisturbed, site):
    _, got = undisturbed
    assert got == []
    neighbour = site.network.hosts["neighbour"]
    refusal = submitted_by(neighbour, site.head)
    assert "1000007" not in refusal
    assert "401" in refusal or "authentication" in refusal.lower(), refusal


def test_the_same_neighbour_gets_what_it_wants_where_no_token_is_asked_for(undisturbed, site):
    """The control: it is the token that keeps the neighbour out."""
    neighbour, open_host = site.network.hosts["neighbour"], site.network.add("open")
    options = [f"--port={GCS_PORT}", f"--node-ip-address={open_host.address}", "--dashboard-host=0.0.0.0", "--num-cpus=1"]
    done = open_host.run(BIN / "ray", "start", "--head", *options, "--disable-usage-stats", RAY_AUTH_MODE="disabled")
    assert done.returncode == 0, done.stderr
    got = tried_by(neighbour, [open_host], "CheckAlive|GetAllNodeInfo|GetSystemConfig|^/nodes$|^/api/jobs/$|^/metrics$")
    answered = {answer[2].rpartition("/")[2] or answer[2] for answer in got}
    assert {"CheckAlive", "GetAllNodeInfo", "GetSystemConfig", "nodes", "get /api/jobs/", "metrics"} <= answered
    assert "1000007" in submitted_by(neighbour, open_host)
    open_host.kill()


def test_a_cut_cable_a_lost_host_and_lost_servers_change_nothing(undisturbed, site):
    """A worker's host cut off for 20 s, one killed and started again, MLflow's restarted, PostgreSQL killed."""
    calm, _ = undisturbed
    run = Run(site, "disturbed").start()
    run.wait_for(lambda: run.newest_step() > 0, "the first step")
    site.network.cut(site.one)
    time.sleep(20)
    site.network.join(site.one)
    run.wait_for_steps(2)
    site.two.kill()
    run.wait_for(lambda: "waiting for room" in run.log, "the loss of a host")
    site.start_worker(site.two)
    run.wait_for_steps(2)
    site.tracking.kill()
    run.wait_for_steps(2)
    site.start_tracking()
    site.database.kill()
    run.wait_for_steps(2)
    site.start_database()
    run.end()
    assert run.shards() == calm.shards()
    assert run.weights() == calm.weights()
    assert run.metrics() == calm.metrics()
    assert len(run.metrics()) == len(NAMES) * SETTINGS["train.epochs"]


def test_training_follows_hosts_that_come_and_go(undisturbed, site):
    """One host; a second joins; the first is drained, as an operator does it, and leaves."""
    calm, _ = undisturbed
    site.two.kill()
    run = Run(site, "elastic")
    for stage in ("index", "shards", "audit"):
        shutil.copytree(calm.workdir / "store" / stage, run.workdir / "store" / stage)
    shards = {"shards.output": f"s3://bucket/{calm.name}/shards", "train.min_workers": 1, "search.num_trials": 0}
    run.start("--only", "train", **shards)
    run.wait_for_steps(1)
    site.start_worker(site.two)
    run.wait_for(lambda: site.two.runs(WORKER), "a worker on the second host")
    run.wait_for_steps(2 * STEPS_PER_EPOCH)
    assert site.one.runs(WORKER)
    drain(site, site.one)
    run.wait_for(lambda: not site.one.runs(WORKER), "the first host without a worker")
    site.one.kill()
    run.end()
    assert run.ledgers() == calm.ledgers()
    workers = [float(value) for _, _, value in run.metrics("work/workers")]
    assert (set(workers), workers[-1]) == ({1, 2}, 1)
    site.start_worker(site.one)


def drain(site: Site, host: Host) -> None:
    """Tell Ray that the host will be taken away."""
    nodes = site.head.run(sys.executable, "-c", _NODE_ID, f"{site.head.address}:{GCS_PORT}", host.address)
    assert nodes.returncode == 0, nodes.stderr
    options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds", "300"]
    node = ["--address", f"{site.head.address}:{GCS_PORT}", "--node-id", nodes.stdout.strip()]
    done = site.head.run(BIN / "ray", "drain-node", *node, *options)
    assert done.returncode == 0, done.stderr


_NODE_ID = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
print(next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == sys.argv[2]))
"""
