"""Tables lose nothing in a pipe, and take texts as they are."""

import json

import pytest

from pipelines.printing import print_card, print_json, print_table
from pipelines.reproduction import Band, reproduction_card


def test_a_pipe_gets_every_row_on_one_line_and_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a-video-with-a-long-name-" * 12
    print_table(("video", "what was found", "frames"), [(name, "[bold]x[/]", "7"), ("b", "y", "1,000")], numbers_from=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["video", "what", "was", "found", "frames"],
        [name, "[bold]x[/]", "7"],
        ["b", "y", "1,000"],
    ]
    assert len({len(line) for line in lines}) == 1  # numbers end below each other


def test_json_is_one_document_without_values_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"a": float("nan")})


def test_a_card_is_its_sentence_and_a_row_a_band(capsys: pytest.CaptureFixture[str]) -> None:
    card = reproduction_card("demo", {"": [Band(low=0.8, source="[seen]")]}, {"": {"top1": 0.7}}, {})
    print_card(card)
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == card["sentence"]
    assert lines[3].split() == ["top-1", "at", "least", "80.0", "%", "70.0", "%", "no", "[seen]"]
