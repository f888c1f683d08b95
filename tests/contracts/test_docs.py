"""README and program say the same."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "infra" / "README.md").read_text()
DEPLOY = "\n".join(path.read_text() for path in sorted((ROOT / "infra" / "deploy").rglob("*")) if path.is_file())
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


def commands(text: str) -> list[list[str]]:
    """Each `sagsm ...` in backticks, an indented block or a deploy file, as words, to the end of its quotes or line."""
    joined = re.sub(r"\\\n *|(?<=\S)\n +(?=--(?:set|workdir|address) )", " ", text)
    found = []
    for line in joined.splitlines():
        for match in re.finditer(r"(?<!\w )(?<![\w./-])(?:\.venv/bin/)?(sagsm (?!&)[a-z].*)", line):
            before, command = line[: match.start()], match[1]
            quotes = [quote for quote in "`'" if before.count(quote) % 2]
            if not quotes and not re.match(r" {4}|# {3}", line):
                continue  # prose
            for quote in quotes:
                command = command.split(quote)[0].removesuffix("\\")  # a backtick that a shell script escapes
            words = shlex.split(command, comments=True)
            if len(words) > 2 or not quotes:  # `sagsm run` alone is a name, no command
                found.append(words[1:])
    return found


def test_every_command_that_the_docs_show_is_one(tmp_path, monkeypatch):
    from infra.settings import parse_assignments
    from pipelines.cli import app
    from pipelines.comparison import Comparison
    from pipelines.experiments import find_experiment
    from pipelines.presets import apply_preset

    shown = commands(README) + commands(GUIDE) + commands(DEPLOY)
    assert len(shown) > 30
    assert ["run", "demo", "--address", "auto", "--workdir", "/work"] in shown
    for words in shown:
        command, arguments = typer.main.get_command(app), words
        context = command.make_context("sagsm", list(arguments))
        try:
            while isinstance(command, typer.core.TyperGroup):
                name, command, arguments = command.resolve_command(context, arguments)
                context = command.make_context(name, list(arguments), parent=context)
            if words[0] in ("plan", "run") and not words[1].isupper():
                experiment = find_experiment(context.params["experiment"])()
                overrides = parse_assignments(context.params["set_"])
                if isinstance(experiment, Comparison):
                    experiment.with_overrides(overrides)
                else:
                    apply_preset(experiment, overrides)
        except Exception as error:
            error.add_note(f"the docs show: sagsm {shlex.join(words)}")
            raise


def test_the_pictures_of_tracking_are_small_shown_and_made_by_the_test_of_the_browser():
    folder = ROOT / "infra" / "pictures"
    shown = re.findall(r"!\[[^\]]+\]\(pictures/(\w+)\.webp\)", (ROOT / "infra" / "TRACKING.md").read_text())
    made = re.findall(r"reviewer\.keep\(\"(\w+)\"\)", (ROOT / "tests" / "end_to_end" / "test_browser.py").read_text())
    assert sorted(shown) == sorted(made) == sorted(path.stem for path in folder.iterdir())
    assert all(path.stat().st_size < 150_000 for path in folder.iterdir())
