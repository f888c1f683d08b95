"""infra/deploy/Dockerfile holds against hadolint and our rules, with the Python and Ray of constraints.txt."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
TEXTS = {name: (ROOT / "infra" / "deploy" / name).read_text() for name in ("Dockerfile", "Dockerfile.dockerignore")}
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HADOLINT = Path(sys.executable).with_name("hadolint")
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY\b")


def problems(texts: dict[str, str]) -> list[str]:
    text = texts["Dockerfile"]
    done = subprocess.run(
        [HADOLINT, "--no-fail", "--format", "json", "-"], input=text, capture_output=True, text=True, check=False
    )
    try:
        found = [f"line {each['line']}: {each['code']}: {each['message']}" for each in json.loads(done.stdout)]
    except json.JSONDecodeError:
        found = [done.stdout + done.stderr]
    return found or [*stage_problems(text), *copy_problems(text, texts["Dockerfile.dockerignore"])]


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of each, on one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name.upper(), rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages(text: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """For each stage what it is made from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for name, rest in instructions(text):
        if name == "FROM":
            origin, _, stage = rest.partition(" AS ")
            found[stage] = (origin, [])
        else:
            found[stage][1].append((name, rest))
    return found


def stage_problems(text: str) -> Iterator[str]:
    found = stages(text)
    if list(found) != ["base", "mlflow", "sagsm"]:
        yield f"expected the stages base, mlflow, sagsm (the last is what a plain build makes), found {list(found)}"
        return
    match = re.fullmatch(r"python:((\d+\.\d+)\.\d+)-slim-\w+(@sha256:[0-9a-f]{64})?", found["base"][0])
    if not match or Version(match[1]) < Version("3.11.13"):
        yield f"base {found['base'][0]} is no exact Python from 3.11.13 on"
    elif match[2] != re.search(r"Python (\d+\.\d+)", CONSTRAINTS)[1]:
        yield f"Python {match[2]} is not that of constraints.txt"
    for stage in ("mlflow", "sagsm"):
        origin, lines = found[stage]
        if origin != "base":
            yield f"{stage} is made from {origin}"
        users = [rest for name, rest in lines if name == "USER"]
        if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
            yield f"{stage} may run as root: Kubernetes wants to see a number"
        installs = [rest for name, rest in lines if name == "RUN" and "pip install" in rest]
        yield from install_problems(stage, installs)
    everything = [item for _, lines in found.values() for item in lines]
    yield from (
        f"{rest.split('=')[0]} is in the image" for name, rest in everything if name in ("ENV", "ARG") and SECRET.search(rest)
    )
    yield from ("ADD fetches or unpacks" for name, _ in everything if name == "ADD")


def install_problems(stage: str, installs: list[str]) -> Iterator[str]:
    """Everything in the versions of constraints.txt, among them Ray's, and from the lists of pyproject.toml."""
    if "\nray==" not in CONSTRAINTS:
        yield "constraints.txt has no Ray"
    section = {"mlflow": "['optional-dependencies']['server']", "sagsm": "['dependencies']"}[stage]
    if not any(f"['project']{section}" in install and "open('pyproject.toml'" in install for install in installs):
        yield f"{stage} is not made from pyproject.toml's {section}"
    for install in installs:
        words = install.rpartition("pip install")[2].split("&&")[0].split()
        if "--no-deps" in words and words[-2:] == ["--editable", "."]:
            continue
        if words != ["--requirement", "/tmp/requirements.txt", "--constraint", "constraints.txt"]:
            yield f"{stage} installs versions that were not tested: pip install {' '.join(words)}"
    if stage == "sagsm" and not any("--editable ." in install for install in installs):
        yield "our packages are not installed, or not in a folder of their own"


def copy_problems(text: str, ignore: str) -> Iterator[str]:
    copied = [source for name, rest in instructions(text) if name == "COPY" for source in rest.split()[:-1]]
    yield from (f"COPY {source}: not in the checkout" for source in copied if not (ROOT / source).exists())
    packages = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    wanted = packages | {"pyproject.toml", "constraints.txt", "README.md", ".rayignore"}
    yield from (f"{name} is not copied" for name in sorted(wanted - set(copied)))
    yield from (f"{name} is copied" for name in sorted(set(copied) - wanted))
    lines = [line for line in ignore.splitlines() if line and not line.startswith("#")]
    if lines[:1] != ["*"]:
        yield "Dockerfile.dockerignore: expected to begin with *, so that data and secrets stay out"
    seen = {line[1:].removesuffix("/**") for line in lines if line.startswith("!")}
    yield from (f"Dockerfile.dockerignore: hides {name}" for name in sorted(wanted - seen))
    yield from (f"Dockerfile.dockerignore: shows {name}" for name in sorted(seen - wanted))
    if lines[-2:] != ["**/__pycache__", "**/*.pyc"]:
        yield "Dockerfile.dockerignore: expected **/__pycache__ and **/*.pyc last, so that no bytecode comes along"


def test_the_files_are_right():
    assert problems(TEXTS) == []


def test_the_image_has_what_constraints_txt_has():
    """The words of the requirement: the same Python, and Ray by the constraints, which name one version."""
    base = stages(TEXTS["Dockerfile"])["base"][0]
    assert base.startswith(f"python:{re.search(r'Python (3[.]11)', CONSTRAINTS)[1]}.")
    assert len(re.findall(r"^ray==[\d.]+$", CONSTRAINTS, flags=re.MULTILINE)) == 1
    assert any(requirement.startswith("ray[") for requirement in PROJECT["project"]["dependencies"])


STRANGERS = (".git", ".env", "tests", "mlflow.env", "user.json")
MISTAKES = [
    ("Dockerfile", "python:3.11.14-slim-bookworm", "python:latest", "latest"),
    ("Dockerfile", "python:3.11.14-slim-bookworm", "python", "tag"),
    ("Dockerfile", "python:3.11.14-slim-bookworm", "python:3.11-slim-bookworm", "no exact Python"),
    ("Dockerfile", "python:3.11.14-slim-bookworm", "python:3.11.7-slim-bookworm", "3.11.13"),
    ("Dockerfile", "python:3.11.14-slim-bookworm", "python:3.12.12-slim-bookworm", "not that of constraints.txt"),
    ("Dockerfile", "USER 1000:1000\nWORKDIR /work\nEXPOSE", "WORKDIR /work\nEXPOSE", "mlflow may run as root"),
    ("Dockerfile", 'USER 1000:1000\nWORKDIR /work\nCMD ["sagsm"', 'USER root\nWORKDIR /work\nCMD ["sagsm"', "root"),
    (
        "Dockerfile",
        'USER 1000:1000\nWORKDIR /work\nCMD ["sagsm"',
        'USER sagsm\nWORKDIR /work\nCMD ["sagsm"',
        "DL3066",
    ),
    ("Dockerfile", " --constraint constraints.txt", "", "not tested"),
    ("Dockerfile", "pip install --no-deps --editable .", "pip install --no-deps --editable . && pip install ray", "DL3013"),
    ("Dockerfile", "pip install --no-deps --editable .", "pip install --no-deps .", "folder of their own"),
    (
        "Dockerfile",
        "pip install --no-deps --editable .",
        "pip install --no-deps --editable . && pip install ray==2.59.0",
        "not tested",
    ),
    ("Dockerfile", "['dependencies']", "['dependency-groups']", "not made from"),
    ("Dockerfile", "WORKDIR /opt/sagsm", "RUN cd /opt/sagsm", "DL3003"),
    ("Dockerfile", "COPY tuning tuning\n", "", "tuning is not copied"),
    ("Dockerfile", "COPY tuning tuning", "COPY tunning tunning", "not in the checkout"),
    ("Dockerfile", "COPY tuning tuning", "COPY . .", "copied"),
    ("Dockerfile", "COPY README.md .rayignore ./", "COPY README.md ./", ".rayignore is not copied"),
    ("Dockerfile", "COPY README.md .rayignore ./", "COPY README.md .rayignore here", "DL3021"),
    ("Dockerfile", "COPY tuning tuning", "ADD tuning tuning", "DL3020"),
    ("Dockerfile", "RUN apt-get update", "RUN sudo apt-get update", "sudo"),
    ("Dockerfile", "    && rm -rf /var/lib/apt/lists/*", "    && true", "DL3009"),
    ("Dockerfile", "--no-install-recommends ", "", "DL3015"),
    ("Dockerfile", "--yes ", "", "DL3014"),
    ("Dockerfile", "ENV HOME=/home/sagsm", "ENV RAY_AUTH_TOKEN=0123456789abcdef", "DL3064"),
    ("Dockerfile", "FROM base AS sagsm", "FROM bse AS sagsm", "DL3006"),
    ("Dockerfile", "FROM base AS mlflow", "FROM base AS server", "expected the stages"),
    ("Dockerfile", "COPY models models", "COPPY models models", "unexpected"),
    ("Dockerfile", 'CMD ["sagsm", "--help"]', "CMD sagsm --help", "DL3025"),
    ("Dockerfile.dockerignore", "*\n!.rayignore", "!.rayignore", "begin with *"),
    ("Dockerfile.dockerignore", "!tuning/**\n", "", "hides tuning"),
    ("Dockerfile.dockerignore", "!tuning/**\n", "!tuning/**\n!work/**\n", "shows work"),
    ("Dockerfile.dockerignore", "\n*\n", "\n", "begin with *"),
    ("Dockerfile.dockerignore", "\n*\n", "\n**/*.py\n", "begin with *"),
    ("Dockerfile.dockerignore", "\n*\n", "\n!*\n", "begin with *"),
    *[("Dockerfile.dockerignore", f"!{name}\n", "", f"hides {name}") for name in (".rayignore", "README.md", "pyproject.toml")],
    *[("Dockerfile.dockerignore", f"!{name}", f"!{name}s", f"hides {name}") for name in ("constraints.txt", "README.md")],
    *[("Dockerfile.dockerignore", f"!{name}/**", f"{name}/**", f"hides {name}") for name in ("infra", "models", "pipelines")],
    *[("Dockerfile.dockerignore", "!tuning/**", f"!tuning/**\n!{name}", f"shows {name}") for name in STRANGERS],
    *[("Dockerfile.dockerignore", word, "", "no bytecode") for word in ("**/__pycache__", "**/*.pyc")],
]


@pytest.mark.parametrize(
    "name, right, wrong, said",
    MISTAKES,
    ids=[f"{name}: {(wrong.strip() or right.strip())[:40]}" for name, right, wrong, _ in MISTAKES],
)
def test_a_mistake_is_found(name, right, wrong, said):
    assert right in TEXTS[name]
    found = problems({**TEXTS, name: TEXTS[name].replace(right, wrong, 1)})
    assert [problem for problem in found if said in problem], found
