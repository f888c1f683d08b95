"""README and program say the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SAGSM = Path(sys.executable).with_name("sagsm")


def test_the_plan_in_the_readme_is_what_the_program_prints(tmp_path):
    done = subprocess.run([SAGSM, "plan", "demo", "--workdir", tmp_path / "work"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in README
    assert not (tmp_path / "work").exists()


def test_every_command_is_in_the_readme_and_has_help():
    done = subprocess.run([SAGSM, "--help"], capture_output=True, text=True, check=True)
    commands = re.findall(r"^\s+([a-z]+)\s{2,}\S", done.stdout.split("Commands")[1], flags=re.MULTILINE)
    assert {"plan", "run", "experiments", "models", "ui", "shards"} <= set(commands)
    for command in commands:
        assert f"sagsm {command}" in README
        text = subprocess.run([SAGSM, command, "--help"], capture_output=True, text=True, check=True).stdout
        assert len(text.split()) > 10


def test_every_experiment_is_in_the_readme():
    from pipelines.experiments import EXPERIMENTS

    assert [name for name in EXPERIMENTS if f"`{name}`" not in README] == []


@pytest.mark.parametrize("target", re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
def test_make_help_lists_every_target(target):
    done = subprocess.run(["make", "--no-print-directory", "help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"make {target} " in done.stdout


def test_files_named_in_the_readme_exist():
    named = re.findall(r"`((?:pipelines|preprocessing|models|tuning|infra)/[\w/.]+\.(?:py|md))`", README)
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_pictures_of_tracking_are_small_shown_and_made_by_the_test_of_the_browser():
    folder = ROOT / "infra" / "pictures"
    shown = re.findall(r"!\[[^\]]+\]\(pictures/(\w+)\.webp\)", (ROOT / "infra" / "TRACKING.md").read_text())
    made = re.findall(r"reviewer\.keep\(\"(\w+)\"\)", (ROOT / "tests" / "end_to_end" / "test_browser.py").read_text())
    assert sorted(shown) == sorted(made) == sorted(path.stem for path in folder.iterdir())
    assert all(path.stat().st_size < 150_000 for path in folder.iterdir())
