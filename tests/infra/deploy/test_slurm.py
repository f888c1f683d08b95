"""infra/deploy/slurm.sh holds against shellcheck and Slurm's rules, and does what it says beside a Slurm of shell scripts."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "infra" / "deploy" / "slurm.sh").read_text()
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
DIRECTIVES = {
    "job-name": r"[\w-]+",
    "nodes": r"[1-9]\d*",
    "ntasks-per-node": "1",  # `ray symmetric-run` starts one Ray on each
    "exclusive": "",
    "mem": r"0|\d+G",
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "requeue": "",
    "signal": r"B:USR1@\d+",  # B: the script's shell alone, which then ends the step in good order
    "open-mode": "append",
    "output": r"\S+",
}
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$TEST_LOG/srun"
env > "$TEST_LOG/environment"
stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$TEST_LOG/mode"
cp "$RAY_AUTH_TOKEN_PATH" "$TEST_LOG/token"
if [[ -e $TEST_LOG/wait ]]; then
    trap 'echo TERM > "$TEST_LOG/signal"; exit 143' TERM
    touch "$TEST_LOG/waits"
    while true; do sleep 0.05; done
fi
exit "${TEST_STATUS:-0}"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) for node in first second third; do echo "$node"; done ;;
    *) echo "$@" >> "$TEST_LOG/scontrol" ;;
esac
"""
ARGUMENTS = ["something_v1", "--set", "search.space={a: {kind: range}}", "--workdir", "/a folder/work"]


def problems(text: str, folder: Path) -> list[str]:
    done = subprocess.run([SHELLCHECK, "--format=json", "-"], input=text, capture_output=True, text=True, check=False)
    found = [f"line {each['line']}: SC{each['code']}: {each['message']}" for each in json.loads(done.stdout)]
    return [*found, *directive_problems(text)] or list(behaviour_problems(text, folder))


def directive_problems(text: str) -> Iterator[str]:
    lines = text.splitlines()
    commands = [number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    found = {}
    for number, line in enumerate(lines):
        if not line.upper().startswith("#SBATCH"):
            continue
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        if not match or match[1] not in DIRECTIVES or not re.fullmatch(DIRECTIVES[match[1]], match[2] or ""):
            yield f"line {number + 1}: not a directive of Slurm that we know: {line}"
        elif number > commands[0]:
            yield f"line {number + 1}: Slurm reads no directive after the first command"
        else:
            found[match[1]] = match[2]
    yield from (f"#SBATCH --{name} is missing" for name in DIRECTIVES if name not in found)
    if not text.startswith("#!/usr/bin/env bash\n"):
        yield "sbatch wants an interpreter in the first line"
    if "set -euo pipefail" not in text:
        yield "a command that fails does not end the script"


class Job:
    """A job that runs the script in a checkout with a `sagsm` of its own."""

    def __init__(self, text: str, folder: Path) -> None:
        self.checkout, self.log = folder / "check out", folder / "log"
        for place in (self.checkout / ".venv" / "bin", self.log, folder / "bin"):
            place.mkdir(parents=True)
        for path, body in ((folder / "bin" / "srun", SRUN), (folder / "bin" / "scontrol", SCONTROL)):
            path.write_text(body)
            path.chmod(0o755)
        sagsm = self.checkout / ".venv" / "bin" / "sagsm"
        sagsm.touch(0o755)
        (self.checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
        self.script = folder / "slurm.sh"
        self.script.write_text(text)
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "TEST_LOG": str(self.log),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "first,second,third",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_SUBMIT_DIR": str(self.checkout),
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.script, *arguments],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def tokens(self) -> list[str]:
        return [path.name for path in self.checkout.iterdir() if path.name != ".venv"]


def behaviour_problems(text: str, folder: Path) -> Iterator[str]:
    job = Job(text, folder / "runs")
    status, output = job.run(*ARGUMENTS)
    if status != 0 or not (job.log / "srun").exists():
        yield f"does not run: {output}"
        return
    words = (job.log / "srun").read_text().splitlines()
    address = "first:23456"
    wanted = ["--address", address, "--min-nodes", "3", "--dashboard-host", "127.0.0.1", "--", "sagsm", "run", *ARGUMENTS]
    if words[1:] != ["ray", "symmetric-run", *wanted, "--address", address]:
        yield f"starts something else: {words}"
    variables = dict(line.partition("=")[::2] for line in (job.log / "environment").read_text().splitlines())
    if variables.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN" in variables:
        yield "no token, or one in the environment, where others see it"
    token = (job.log / "token").read_text().strip()
    if not re.fullmatch("[0-9a-f]{64}", token) or (job.log / "mode").read_text().strip() != "600":
        yield "the token is short, or can be read by others"
    if job.tokens():
        yield "the token stays behind"
    if job.run(*ARGUMENTS, TEST_STATUS="3")[0] != 3:
        yield "the exit code of the experiment is lost"


def test_the_script_is_right(tmp_path):
    assert problems(TEXT, tmp_path) == []
    assert os.access(ROOT / "infra" / "deploy" / "slurm.sh", os.X_OK)


@pytest.fixture
def waiting(tmp_path) -> tuple[Job, subprocess.Popen[str]]:
    """A job whose step goes on until it is ended."""
    job = Job(TEXT, tmp_path / "job")
    (job.log / "wait").touch()
    process = job.start(*ARGUMENTS)
    deadline = time.monotonic() + 60
    while not (job.log / "waits").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [stat.S_IMODE((job.checkout / name).stat().st_mode) for name in job.tokens()] == [0o600]
    return job, process


def test_slurms_warning_ends_the_step_and_queues_the_job_again(waiting):
    job, process = waiting
    os.kill(process.pid, signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert "queued again" in output
    assert (job.log / "signal").read_text() == "TERM\n"
    assert (job.log / "scontrol").read_text() == "requeue 123456\n"
    assert process.returncode != 0
    assert job.tokens() == []


def test_a_job_that_is_cancelled_is_not_queued_again(waiting):
    """Slurm sends TERM to the shell and to the step."""
    job, process = waiting
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=60)
    assert process.returncode == 143
    assert not (job.log / "scontrol").exists()
    assert job.tokens() == []


def test_what_is_missing_is_said_before_anything_starts(tmp_path):
    job = Job(TEXT, tmp_path / "job")
    assert job.run()[0] == 2
    status, output = job.run("demo", SLURM_JOB_ID="")
    assert status != 0
    assert "sbatch" in output
    shutil.rmtree(job.checkout / ".venv")
    status, output = job.run("demo")
    assert status == 2
    assert "make setup" in output
    assert not (job.log / "srun").exists()


MISTAKES = [
    ("#!/usr/bin/env bash\n", "", "interpreter"),
    ("#SBATCH --nodes=1", "#SBATCH --node=1", "--node=1"),
    ("#SBATCH --nodes=1", "#SBATCH --nodes=one", "--nodes=one"),
    ("#SBATCH --nodes=1", "#SBATCH nodes=1", "not a directive"),
    ("#SBATCH --nodes=1", "# SBATCH --nodes=1", "--nodes is missing"),
    ("#SBATCH --ntasks-per-node=1", "#SBATCH --ntasks-per-node=16", "ntasks-per-node=16"),
    ("#SBATCH --exclusive\n", "", "--exclusive is missing"),
    ("#SBATCH --requeue\n", "", "--requeue is missing"),
    ("#SBATCH --signal=B:USR1@120", "#SBATCH --signal=USR1@120", "USR1@120"),
    ("#SBATCH --time=24:00:00", "#SBATCH --time=24", "--time=24"),
    ("#SBATCH --job-name=sagsm\n", "umask 022\n#SBATCH --job-name=sagsm\n", "no directive after the first command"),
    ("set -euo pipefail\n", "", "does not end the script"),
    ("umask 077", "umask 022", "can be read by others"),
    ('sagsm run "$@"', "sagsm run $@", "SC2068"),
    ('sagsm run "$@"', 'sagsm run "$*"', "starts something else"),
    ('rm -f "$token"', "rm -f $token", "stays behind"),
    ('rm -f "$token"', 'true "$token"', "stays behind"),
    ("RAY_AUTH_MODE=token ", "", "no token"),
    ("RAY_AUTH_TOKEN_PATH=$token", 'RAY_AUTH_TOKEN_PATH=$token RAY_AUTH_TOKEN="$(cat "$token")"', "SC2155"),
    ("token_hex(32)", "token_hex(4)", "short"),
    ("--dashboard-host 127.0.0.1", "--dashboard-host 0.0.0.0", "starts something else"),
    ('--min-nodes "$SLURM_JOB_NUM_NODES"', "--min-nodes 1", "starts something else"),
    ('--address "$address" &', '--address "$adress" &', "adress"),
    ("step=$!\n", "step = $!\n", "SC2283"),
    ('wait "$step"\n', "wait\n", "exit code of the experiment"),
    ("    exit 2\nfi\ncheckout", "    exit 2\ncheckout", "SC1"),
    ("$((20000 + SLURM_JOB_ID % 10000))", "$((20000 + SLURM_JOB_ID))", "starts something else"),
    ("-- sagsm run", "sagsm run", "starts something else"),
]


@pytest.mark.parametrize("right, wrong, said", MISTAKES, ids=[wrong.strip()[:50] for _, wrong, _ in MISTAKES])
def test_a_mistake_is_found(right, wrong, said, tmp_path):
    assert right in TEXT
    changed = wrong.join(TEXT.rsplit(right, 1)) if right.startswith("wait") else TEXT.replace(right, wrong, 1)
    found = problems(changed, tmp_path)
    assert [problem for problem in found if said in problem], found
