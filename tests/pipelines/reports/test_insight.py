from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.insight.section import Column, Film, Picture, Section, ShownClip, Table
from pipelines.reports.insight import describe_insight, write_insight

FRAME = np.zeros((30, 40, 3), np.uint8)


@pytest.fixture
def sections(tmp_path: Path, hostile_names: list[str]) -> list[Section]:
    (tmp_path / "figures").mkdir()
    for name in ("map", "sheet"):
        Image.new("RGB", (900, 300)).save(tmp_path / "figures" / f"{name}.png")
    pictures = [
        Picture(tmp_path / "figures" / "map.png", "features/map", f"map of {hostile_names[3]}", "how to read it"),
        Picture(tmp_path / "figures" / "sheet.png", "contact_sheet/sheet", "in MLflow alone", on_page=False),
    ]
    film = Film(tmp_path / "figures" / "a.gif", tmp_path / "figures" / "a.mp4", f"film of {hostile_names[0]}", "how it moves")
    Image.new("RGB", (960, 300)).save(film.gif)
    columns = (Column("class", "class"), Column("num_clips", "clips", "count"), Column("purity", "share", "percent"))
    rows = [{"class": name, "num_clips": 1234, "purity": None if name.startswith("=") else 0.5} for name in hostile_names]
    return [
        Section(
            "Alike",
            f"Half of {hostile_names[0]} are alike.",
            pictures=pictures,
            tables=[
                Table("classes", "all classes", columns, rows, num_shown=3),
                Table("clips", "where each clip lies", (Column("x", "x", "number"),), [{"x": 0.12345}], num_shown=0),
            ],
            numbers=[("12 of 34", "answers")],
            doubts=["Only one seed."],
        ),
        Section("Looks", "It looks.", films=[film]),
        Section("Wrong", f"{hostile_names[2]} is wrong.", clips=[ShownClip(hostile_names[1], "clip v1", [FRAME] * 4)]),
    ]


def test_the_page_opens_with_the_answer_and_holds_all_that_it_shows(
    tmp_path: Path, sections: list[Section], read_page: Callable[[Path], Any], hostile_names: list[str]
) -> None:
    path = write_insight(tmp_path, f"sagsm: {hostile_names[0]}", sections)
    assert path.name == "index.html"
    page = read_page(path)
    text = " ".join(" ".join(page.text).split())
    parts = [
        sections[0].sentence,
        "12 of 34",
        "What to distrust",
        "Only one seed.",
        "Alike",
        "how to read it",
        "1,234",
        "50.0 %",
        "how it moves",
        "Wrong",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "all classes; here 3, all in tables/classes.csv" in text
    assert "where each clip lies: tables/clips.csv" in text
    assert "0.12345" in (tmp_path / "tables" / "clips.csv").read_text()
    assert hostile_names[4] not in text  # a row beyond the three that are shown
    assert page.tags.count("img") == 1 + 1 + 4
    assert 'alt="frame 2 of 4' in path.read_text()
    table = (tmp_path / "tables" / "classes.csv").read_text(encoding="utf-8")
    assert "'=cmd" in table
    assert table.count("1234") == len(hostile_names)


def test_the_description_begins_with_the_sentence_and_shows_every_picture(sections: list[Section]) -> None:
    text = describe_insight(sections, "abc")
    assert text.startswith("Half of &lt;img src=x onerror=alert(1)&gt; are alike.")
    assert "<" not in text
    for name in ("map", "sheet"):
        assert f"![{name}](get-artifact?path=figures/{name}.png&run_uuid=abc)" in text


def test_the_same_sections_give_the_same_page(tmp_path: Path, sections: list[Section]) -> None:
    first, second = (write_insight(tmp_path, "t", sections).read_bytes() for _ in range(2))
    assert first == second
