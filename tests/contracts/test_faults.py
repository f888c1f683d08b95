"""Each fault in pipelines/training/FAULTS.md has the test that it names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "pipelines/training/FAULTS.md").read_text().splitlines() if line.startswith("| ")][1:]


def test_the_table_has_the_faults_that_users_meet():
    text = "\n".join(ROWS)
    for fault in ("corrupt bytes", "missing", "label passport", "full", "checkpoint is cut", "worker is killed", "(raylet)"):
        assert fault in text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_test_of_a_fault_exists(row):
    fault, effect, test = (cell.strip() for cell in row.strip("|").split("|"))
    assert fault
    assert effect
    match = re.fullmatch(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", test)
    assert match, test
    path = ROOT / match[1]
    assert path.is_file(), f"{path} does not exist"
    functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert match[2] is None or match[2] in functions
