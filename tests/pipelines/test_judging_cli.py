import json

import pytest
from typer.testing import CliRunner

from infra.errors import DataError
from pipelines.cli import app

SMALL = {"model.name": "tsn_resnet18", "train.pixels": 32, "train.num_segments": 2}


@pytest.fixture
def two(finish):
    return [finish({**SMALL, "train.epochs": epochs}, share=share).fingerprint for epochs, share in ((5, 0.25), (6, 0.75))]


def call(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_compare_prints_a_table_and_where_the_page_is(two, tmp_path):
    text = call("compare", *two, "--workdir", tmp_path, "--output", tmp_path / "pages")
    assert f"demo-{two[1][:6]} is 50.0 points above demo-{two[0][:6]}" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("demo-")]
    assert rows[0][:2] == [f"demo-{two[0][:6]}", "25.0%"]
    assert f"demo-{two[1][:6]}: train.epochs=6" in text
    assert "label passport 5ca1ab1e" in text
    assert f"report:    {tmp_path / 'pages' / 'index.html'}" in text
    assert (tmp_path / "pages" / "index.html").is_file()


def test_compare_prints_one_document(two, tmp_path):
    document = json.loads(call("compare", *two, "--workdir", tmp_path, "--json"))
    assert document["page"].startswith(str(tmp_path / "comparisons"))
    assert len(document["variants"]) == 2
    assert document["data"]["num_clips"] == 40


def test_a_gap_is_refused_where_the_network_is_gone(two, tmp_path):
    done = CliRunner().invoke(app, ["gap", two[0], "--workdir", str(tmp_path), "--output", str(tmp_path / "gap")])
    assert isinstance(done.exception, DataError)
    assert "holds no model" in str(done.exception)
