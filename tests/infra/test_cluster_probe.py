"""What a process says of itself, in this process: folders, raw videos, sources and MLflow."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from infra.cluster import PACKAGES, checkout
from infra.cluster_probe import look, source_digests

NOTHING = {
    "packages": [],
    "distributions": [],
    "ffmpeg": None,
    "folders": {},
    "raw": None,
    "tracking_uri": None,
    "ray_dir": None,
}


def test_it_copies_the_mark_of_the_driver(tmp_path):
    (tmp_path / "theirs").write_text("a mark")
    shared = {"url": str(tmp_path), "theirs": "theirs", "mine": "mine"}
    other = shared | {"theirs": "none"}
    missing = shared | {"url": str(tmp_path / "none")}
    facts = look(NOTHING | {"folders": {"shared": shared, "other": other, "missing": missing}})
    assert facts["folders"] == {
        "shared": "",
        "other": "it is another folder of that name",
        "missing": "there is no such folder",
    }
    assert (tmp_path / "mine").read_text() == "a mark"
    assert set(facts["disks"]) >= {str(tmp_path)}


def test_a_folder_that_it_may_not_write_and_one_in_an_object_store(tmp_path):
    (tmp_path / "theirs").write_text("a mark")
    (tmp_path / "mine").mkdir()  # root may write anywhere, but not over a folder
    folder = {"url": str(tmp_path), "theirs": "theirs", "mine": "mine"}
    remote = {"url": "ftp://bucket", "theirs": "theirs", "mine": "mine"}
    facts = look(NOTHING | {"folders": {"closed": folder, "remote": remote}})
    assert "Is a directory" in facts["folders"]["closed"]
    assert "expected a local path, s3:// or gs://" in facts["folders"]["remote"]


def test_an_object_store(s3_url):
    from infra.filesystems import Folder

    folder = Folder(s3_url) / "store"
    folder.write_bytes("theirs", b"a mark")
    marked = {"url": folder.url, "theirs": "theirs", "mine": "mine"}
    facts = look(NOTHING | {"folders": {"a": marked}, "raw": {"url": s3_url, "entries": [("store", True, 0)]}})
    assert (facts["folders"], facts["raw"]) == ({"a": ""}, "")
    assert folder.read_bytes("mine") == b"a mark"
    facts = look(NOTHING | {"raw": {"url": folder.url, "entries": [("theirs", False, 5)]}})
    assert facts["raw"] == "theirs in it is not what the driver sees"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([("wave", True, 0), ("a.csv", False, 3)], ""),
        ([("a.csv", False, 4)], "a.csv in it is not what the driver sees"),
        ([("wave", False, 0)], "wave in it is not what the driver sees"),
        ([("b.csv", False, 3)], "No such file"),
    ],
)
def test_raw_videos(tmp_path, entries, problem):
    (tmp_path / "wave").mkdir()
    (tmp_path / "a.csv").write_text("abc")
    facts = look(NOTHING | {"raw": {"url": str(tmp_path), "entries": entries}})
    assert problem in facts["raw"]
    assert bool(problem) == bool(facts["raw"])


def test_sources_are_those_of_the_checkout_and_every_byte_of_them_counts(tmp_path):
    facts = look(NOTHING | {"packages": [*PACKAGES, "no_such_package"]})
    assert facts["roots"] == [str(checkout())]
    assert facts["sources"] == source_digests({name: str(checkout() / name) for name in PACKAGES})
    own = hashlib.sha256((checkout() / "infra/cluster_probe.py").read_bytes()).hexdigest()
    assert facts["sources"]["infra/cluster_probe.py"] == own[:16]
    assert any(path.endswith(".html") for path in facts["sources"])
    assert not any("__pycache__" in path for path in facts["sources"])


def test_versions_and_our_own_function():
    facts = look(NOTHING | {"distributions": ["numpy", "no-such-package"], "ffmpeg": "platform:python_version"})
    assert facts["versions"]["no-such-package"] is None
    assert facts["versions"]["numpy"].count(".") == 2
    assert facts["ffmpeg"] == (facts["python"], "")
    assert look(NOTHING | {"ffmpeg": "platform:no_such_function"})["ffmpeg"][1].endswith("'no_such_function'")


class Answers(BaseHTTPRequestHandler):
    """200 for /ok/health, 401 for /locked/health, 403 else."""

    def do_GET(self):
        self.send_response({"/ok/health": 200, "/locked/health": 401}.get(self.path, 403))
        self.end_headers()

    def log_message(self, *_):
        pass


def test_mlflow():
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        found = {name: look(NOTHING | {"tracking_uri": f"{uri}/{name}"})["tracking"] for name in ("ok", "locked", "strange")}
        server.shutdown()
    assert found == {"ok": "", "locked": "", "strange": "it answers 403"}
    assert "refused" in look(NOTHING | {"tracking_uri": uri})["tracking"]
    assert look(NOTHING | {"tracking_uri": "sqlite:////w/mlflow.db"})["tracking"] is None
