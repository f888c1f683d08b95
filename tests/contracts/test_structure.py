"""The rules of the layout that no other tool checks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("infra", "models", "pipelines", "preprocessing", "tuning")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for path in SOURCES]

ENGINES = {
    "mlflow": {"infra/tracking_client.py", "infra/tracking_model.py"},
    "optuna": {"tuning/"},
    "ray": {
        "infra/cluster.py",
        "infra/cluster_check.py",
        "infra/cluster_token.py",
        "preprocessing/tasks.py",
        "pipelines/training/meeting.py",
        "pipelines/training/worker.py",
        "pipelines/graph.py",
        "tuning/process.py",
        "tuning/sampling.py",
        "tuning/schedulers.py",
        "tuning/search.py",
    },
}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_an_engine_is_named_in_few_files(engine):
    users = {str(path.relative_to(ROOT)) for path in SOURCES if engine in imported_packages(path)}
    strangers = {user for user in users if not any(user.startswith(allowed) for allowed in ENGINES[engine])}
    assert users
    assert not strangers


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_come_from_this_checkout(package):
    code = f"import {package}; print({package}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert Path(done.stdout.strip()).parent == ROOT / package


def test_import_does_no_work(tmp_path):
    """All modules in one process, in an empty folder and home: no file is made, no engine is started, nothing is printed."""
    code = (
        "import importlib, sys, threading\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "ray = sys.modules.get('ray')\n"
        "assert ray is None or not ray.is_initialized()\n"
    )
    caches = tmp_path.with_name(f"{tmp_path.name}-caches")  # matplotlib lists the fonts when it is first imported
    env = {
        "MPLCONFIGDIR": str(caches),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_light_commands_load_no_engine():
    """`sagsm --help` must answer at once."""
    code = "import sys, pipelines.cli; print(sorted({'ray', 'mlflow', 'torch', 'optuna', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_definitions_have_docstrings_and_short_bodies(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    methods = [
        member
        for node in public
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
    ]
    assert [node.name for node in [*public, *methods] if not ast.get_docstring(node)] == []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60] == []


def test_tests_mirror_the_source():
    modules = {path.relative_to(ROOT) for path in SOURCES if path.name != "__init__.py"}
    modules |= {Path("infra/deploy") / f"{name}.py" for name in deploy_parts()}
    for test in (ROOT / "tests").rglob("test_*.py"):
        place = test.relative_to(ROOT / "tests")
        if place.parts[0] in ("contracts", "end_to_end", "hosts"):
            continue
        mirrored = place.with_name(place.name.removeprefix("test_"))
        assert mirrored in modules, f"{place} tests {mirrored}, which does not exist"


def deploy_parts() -> set[str]:
    """What infra/deploy holds: files and folders that are no Python, each with a test that checks it."""
    return {path.stem.lower() for path in (ROOT / "infra" / "deploy").iterdir()}


def test_every_deploy_file_has_a_test():
    assert {f"test_{part}" for part in deploy_parts()} == {
        path.stem for path in (ROOT / "tests/infra/deploy").glob("test_*.py")
    }


def test_no_init_files_under_tests():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_packages_are_listed_for_the_wheel():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({str(path.parent.relative_to(ROOT)).replace("/", ".") for path in SOURCES})


def test_nothing_unpickles_and_no_shell():
    """RELIABILITY: no pickle from outside, no shell."""
    banned = ("pickle.load", "yaml.load(", "shell=True", ".extractall(", "os.system(", "weights_only=False")
    found = [(str(path.relative_to(ROOT)), word) for path in SOURCES for word in banned if word in path.read_text()]
    assert found == []
