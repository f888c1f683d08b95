import csv
import io
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.reports.page import percent, write_csv, write_page

FORMULA_STARTS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_no_cell_begins_like_a_formula(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    write_csv(path, ["text"], [{"text": text} for text in texts])
    for row in list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))[1:]:
        assert not row[0].lstrip(" ").startswith(tuple(FORMULA_STARTS))


def test_numbers_stay_numbers_and_text_stays_readable(tmp_path: Path, hostile_names: list[str]) -> None:
    path = write_csv(
        tmp_path / "t.csv", ["name", "value"], [{"name": hostile_names[1], "value": -1.5}, {"name": 'a,"b', "value": None}]
    )
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert rows == [["name", "value"], ["'" + hostile_names[1], "-1.5"], ['a,"b', ""]]


def test_a_value_that_is_missing_is_an_error_and_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        write_page(tmp_path / "page.html", "page.html", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fraction", "text"), [(0.0, "0.0 %"), (1.0, "100.0 %"), (1 / 3, "33.3 %"), (None, "-")])
def test_percent(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text
