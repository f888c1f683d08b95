"""What `sagsm cluster check` prints of nodes; `tests/end_to_end/test_cluster_check.py` asks real ones."""

import json
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from infra.cluster_check import Clock, Node
from infra.cluster_findings import DISTRIBUTIONS, HERE, Finding
from pipelines.cli import app

FACTS = {
    "python": "3.11.13",
    "versions": {"ray": "2.60.0", "torch": "2.14.1", "sagsm": None},
    "sources": {"infra/cluster.py": "0123456789abcdef"},
    "roots": ["/code"],
    "ffmpeg": ("7.1", ""),
    "folders": {"store": ""},
    "raw": None,
    "tracking": "",
    "disks": {"/tmp": (2 * 10**10, 10**11), "/shared": (10**12, 10**13)},
    "ray_dir": None,
    "niceness": 0,
}
SLOW = Finding("10.0.0.2", "niceness", "tasks run there at niceness 15", False)
TORCH = Finding("10.0.0.3", "torch", "has torch 2.1.0, this process 2.14.1", True)


@pytest.fixture
def check(monkeypatch):
    """Runs the command on given nodes; no cluster is started."""

    def run(nodes, *arguments):
        monkeypatch.setattr("infra.cluster.session", lambda address: nullcontext())
        monkeypatch.setattr("infra.cluster_check.check_nodes", lambda question: nodes)
        return CliRunner().invoke(app, ["cluster", "check", *arguments])

    return run


@pytest.fixture
def nodes():
    driver = Node(HERE, {}, FACTS, None, [])
    slow = Node("10.0.0.2", {"CPU": 8.0, "GPU": 1.0, "memory": 3.2e10}, FACTS, Clock(-0.0012, 0.0008), [SLOW])
    other = FACTS | {"versions": FACTS["versions"] | {"torch": "2.1.0"}, "folders": {"store": "none"}, "ffmpeg": ("", "none")}
    return [driver, slow, Node("10.0.0.3", {"CPU": 8.0}, other, Clock(300.0, 0.001), [TORCH])]


def test_two_tables_and_what_is_wrong_with_the_worst_first(check, nodes):
    done = check(nodes)
    assert done.exit_code == 2
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[2] == ["10.0.0.2", "8", "1", "32.0", "20.0", "-0.001", "s", "yes", "yes", "7.1"]
    assert lines[3] == ["10.0.0.3", "8", "0", "0.0", "20.0", "+300.000", "s", "NO", "yes", "missing"]
    assert lines[5] == [*("node", "Python", "our", "code"), *DISTRIBUTIONS]
    assert lines[7] == ["10.0.0.2", "3.11.13", "the", "same", "2.60.0", "2.14.1", "-"]
    assert "BREAKS  10.0.0.3: has torch 2.1.0, this process 2.14.1\nnote    10.0.0.2: tasks run there" in done.stdout
    assert "1 of these would break a run" in done.stderr


def test_nothing_that_breaks_a_run_is_exit_code_0(check, nodes):
    done = check(nodes[:2])
    assert done.exit_code == 0
    assert done.stdout.endswith("note    10.0.0.2: tasks run there at niceness 15\nfit: nothing found that would break a run\n")
    assert check(nodes[:1]).stdout.endswith("\nfit: nothing found\n")


def test_a_node_that_does_not_answer(check, nodes):
    silent = Node("10.0.0.4", {"CPU": 8.0}, None, None, [Finding("10.0.0.4", "answer", "no task can run there: dead", True)])
    done = check([nodes[0], silent])
    assert done.exit_code == 2
    assert done.stdout.count("no answer") == 2
    assert "BREAKS  10.0.0.4: no task can run there: dead" in done.stdout


def test_json(check, nodes):
    done = check(nodes, "--json", "--address", "10.0.0.1:6379")
    assert done.exit_code == 2
    document = json.loads(done.stdout)
    assert (document["address"], document["fit"]) == ("10.0.0.1:6379", False)
    node = document["nodes"][2]
    assert node["findings"] == [{"check": "torch", "breaks": True, "text": "has torch 2.1.0, this process 2.14.1"}]
    assert node["clock"] == {"ahead_seconds": 300.0, "error_seconds": 0.001}
    assert node["facts"]["versions"]["torch"] == "2.1.0"
    assert "sources" not in node["facts"]


def test_set_without_an_experiment(check, nodes):
    done = check(nodes, "--set", "dataset.root=/data")
    assert "--set changes a setting of an experiment; expected it together with --experiment" in str(done.exception)
