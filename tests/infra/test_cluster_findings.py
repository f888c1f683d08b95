"""What is wrong, and how it is said; the facts of a healthy node are those of this very process."""

import pytest

from infra.cluster import PACKAGES
from infra.cluster_findings import DISTRIBUTIONS, HERE, Question, differences, late, problems
from infra.cluster_probe import look
from infra.storage import MINIMUM_FREE_BYTES

QUESTION = Question(folders={"store": "/shared/work/store"}, raw="/data", tracking_uri="http://mlflow:5000")


@pytest.fixture(scope="module")
def healthy():
    asked = {"packages": PACKAGES, "distributions": DISTRIBUTIONS, "ffmpeg": None, "folders": {}, "raw": None}
    facts = look(asked | {"tracking_uri": None, "ray_dir": "/tmp/ray/session"})
    free = 10 * MINIMUM_FREE_BYTES
    return facts | {"niceness": 0, "ffmpeg": ("7.1", ""), "disks": {"/tmp": (free, 2 * free)}}


def test_a_node_like_this_process_has_nothing_wrong(healthy):
    assert problems("a", healthy, QUESTION) == []
    assert differences("a", healthy, healthy) == []


@pytest.mark.parametrize(
    ("change", "check", "parts", "breaks"),
    [
        ({"folders": {"store": "there is no such folder"}}, "store", ["/shared/work/store: there is no such", "mount"], True),
        ({"raw": "[Errno 2] No such file"}, "raw videos", ["raw videos in /data: [Errno 2]", "mount or copy"], True),
        ({"tracking": "timed out"}, "MLflow", ["http://mlflow:5000 does not answer: timed out"], False),
        ({"ffmpeg": ("", "no ffmpeg program was found")}, "ffmpeg", ["no ffmpeg program was found"], True),
        ({"disks": {"/tmp": (5_000_000, 10**9)}}, "free disk", ["5 MB are free in /tmp; expected 200 MB"], True),
        (
            {"disks": {"/r": (10**9, 10**12)}, "ray_dir": "/r"},
            "free disk",
            ["the disk of /r is more than 95% full", "spills no object"],
            False,
        ),
        ({"niceness": 15}, "niceness", ["at niceness 15", "RAY_worker_niceness=0"], False),
        ({"python": "3.13.1"}, "Python", ["has Python 3.13.1, this process 3."], True),
        ({"ffmpeg": ("5.1", "")}, "ffmpeg", ["has ffmpeg 5.1, this process 7.1: shards written there"], False),
        ({"sources": {}}, "code", ["imports none of our packages (infra, models,"], True),
    ],
)
def test_one_thing_that_is_wrong_is_one_finding_with_a_cure(healthy, change, check, parts, breaks):
    facts = healthy | change
    [finding] = problems("10.0.0.3", facts, QUESTION) + differences("10.0.0.3", facts, healthy)
    assert (finding.node, finding.check, finding.breaks) == ("10.0.0.3", check, breaks)
    assert str(finding).startswith("10.0.0.3: ")
    assert [part for part in parts if part not in finding.text] == []


def test_the_driver_needs_mlflow_and_its_own_niceness_is_its_own_affair(healthy):
    [finding] = problems(HERE, healthy | {"tracking": "timed out", "niceness": 5}, QUESTION)
    assert (finding.check, finding.breaks) == ("MLflow", True)


@pytest.mark.parametrize(
    ("package", "theirs", "ours", "text", "breaks"),
    [
        (
            "torch",
            "2.13.0",
            "2.14.1",
            "has torch 2.13.0, this process 2.14.1; install it there: pip install torch==2.14.1",
            True,
        ),
        ("torch", "2.14.1+cu130", "2.14.1+cpu", "has torch 2.14.1+cu130, this process 2.14.1+cpu", False),
        ("torchvision", None, "0.29.1", "has no torchvision, this process 0.29.1", True),
        ("mlflow", "3.16.0", "3.17.2", "has mlflow 3.16.0, this process 3.17.2", False),
        ("ray", "odd", "2.60.0", "has ray odd, this process 2.60.0", True),
    ],
)
def test_versions(healthy, package, theirs, ours, text, breaks):
    versions = healthy["versions"]
    there, here = healthy | {"versions": versions | {package: theirs}}, healthy | {"versions": versions | {package: ours}}
    [finding] = differences("a", there, here)
    assert finding.text.startswith(text)
    assert (finding.check, finding.breaks) == (package, breaks)


def test_other_code_names_some_files_and_where_they_come_from(healthy):
    sources = dict(healthy["sources"])
    for path in sorted(sources)[:5]:
        sources[path] = "0" * 16
    [finding] = differences("a", healthy | {"sources": sources, "roots": ["/opt/old"]}, healthy)
    assert f": 5 of {len(sources)} files differ ({', '.join(sorted(sources)[:3])}, ...), from /opt/old" in finding.text
    assert finding.breaks


@pytest.mark.parametrize(
    ("ahead", "error", "text", "breaks"),
    [
        (1.9, 0.1, None, None),
        (-2.5, 0.6, None, None),
        (3.0, 0.1, "3.0 s ahead of", False),
        (-61.0, 0.1, "61.0 s behind", True),
        (61.0, 5.0, "61.0 s ahead of", False),
        (86_400.0, 0.1, "86,400.0 s ahead of", True),
    ],
)
def test_a_clock_is_judged_beyond_the_error_of_its_measurement(ahead, error, text, breaks):
    found = late("a", ahead, error)
    assert [finding.breaks for finding in found] == ([] if text is None else [breaks])
    assert all(f"its clock is {text} that of this process" in finding.text for finding in found if text)
