"""What a person sees: `sagsm ui` in a real browser."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.tracking import Tracker, tracking_uri

pytestmark = pytest.mark.slow

SAGSM = str(Path(sys.executable).with_name("sagsm"))
CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on this machine (Debian: apt-get install chromium)")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # playwright's own pipes
def test_ui_opens_on_the_runs_page(tmp_path, monkeypatch):
    from playwright.sync_api import sync_playwright

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(tracking_uri(tmp_path), "sagsm-something_v1", tmp_path / "mlflow-artifacts")
    with tracker.start_run("p01 demo", tags={"stage": "pipeline"}) as run:
        run.log_metrics({"test/top1": 0.9})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [SAGSM, "ui", "--workdir", str(tmp_path), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        link = re.search(r"http\S+", server.stdout.readline())
        assert link is not None
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            page = browser.new_page()
            page.goto(link.group())
            page.get_by_text("p01 demo").first.wait_for(timeout=60_000)
            assert "matching run" in page.inner_text("body")
            browser.close()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
        server.stdout.close()
