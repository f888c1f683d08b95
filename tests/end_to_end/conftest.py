"""One finished run of the demo for all tests of this folder, `sagsm ui` on it, and a browser."""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SAGSM = str(Path(sys.executable).with_name("sagsm"))
SMALL = [
    "dataset.synthetic.num_train=64",
    "dataset.synthetic.num_validation=24",
    "dataset.synthetic.num_broken=4",
    "shards.max_bad_fraction=0.1",
    "shards.videos_per_shard=12",
    "search.num_trials=2",
    "search.max_epochs=1",
    "search.subset=24",
    "train.epochs=3",
    "train.warmup_epochs=1",
    "train.num_segments=4",
    "train.pixels=48",
    "train.checkpoint_every_steps=1",
    "train.precision=fp32",
]
CHROMIUM = shutil.which("chromium")
_QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]


@dataclass(frozen=True)
class Demo:
    """A small run of the demo and what it printed; others of the same settings start from it.

    Attributes:
        workdir: of the run.
        document: what `--json` has printed.
        settings: in which it differs from the demo as it is written.
    """

    workdir: Path
    document: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = tuple(SMALL)

    def command(self, verb: str, *more: str, workdir: Path | None = None) -> list[str]:
        settings = [item for assignment in [*self.settings, *more] for item in ("--set", assignment)]
        return [SAGSM, verb, "demo", "--workdir", str(workdir or self.workdir), "--json", *settings]

    def call(self, verb: str, *more: str, workdir: Path | None = None, only: str | None = None) -> "Demo":
        command = [*self.command(verb, *more, workdir=workdir), *(["--only", only] if only else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return Demo(workdir or self.workdir, json.loads(done.stdout), self.settings)

    def stage(self, name: str) -> dict[str, Any]:
        return next(stage for stage in self.document["stages"] if stage["name"] == name)

    def path_of(self, name: str) -> Path:
        return Path(self.stage(name)["path"])

    def run_id_of(self, name: str) -> str:
        return str(self.stage(name)["mlflow_run_id"])


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Not to be changed, but for runs that find everything cached; SAGSM_DEMO names the work directory of a whole one."""
    if made := os.environ.get("SAGSM_DEMO"):
        return Demo(Path(made).absolute(), settings=()).call("run")
    return Demo(tmp_path_factory.mktemp("demo")).call("run")


@pytest.fixture(scope="session")
def serve() -> Callable[[Path], AbstractContextManager[list[str]]]:
    """`sagsm ui` on a work directory; gives the links that it prints."""
    return _serve


@contextmanager
def _serve(workdir: Path) -> Iterator[list[str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [SAGSM, "ui", "--workdir", str(workdir), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        links = []
        for line in server.stdout:
            if line.startswith("Ctrl-C"):
                break
            links += re.findall(r"http\S+", line)
        assert links
        yield links
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
        server.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; opens only what a test tells it to."""
    if CHROMIUM is None:
        pytest.skip("chromium is not on this machine (`make packages` installs it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield browser
        browser.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # playwright's own pipes
        gc.collect()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of pages are kept: SAGSM_SCREENSHOTS, else a folder of pytest."""
    wanted = os.environ.get("SAGSM_SCREENSHOTS")
    folder = Path(wanted) if wanted else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
