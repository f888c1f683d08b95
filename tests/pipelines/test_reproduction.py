import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from infra.settings import apply_overrides
from pipelines.experiments import EXPERIMENTS, find_experiment
from pipelines.reproduction import CARD_HEADER, Band, card_markdown, card_rows, reproduction_card

FRACTIONS = st.floats(0, 1)


@given(low=FRACTIONS, size=FRACTIONS, number=st.floats(-1, 3))
def test_a_band_holds_what_lies_between_its_ends_and_these_themselves(low, size, number):
    band = Band(low=low, high=low + size, source="seen")
    assert band.holds(low)
    assert band.holds(low + size)
    assert band.holds(number) == (low <= number <= low + size)
    assert Band(low=low, source="seen").holds(number) == (number >= low)
    assert Band(high=low, source="seen").holds(number) == (number <= low)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low": 0.3, "high": 0.34}, "30.0 % to 34.0 %"),
        ({"high": 0.35}, "at most 35.0 %"),
        ({"metric": "largest_gamma", "low": 0.0, "high": 0.0}, "0"),
        ({"metric": "largest_gamma", "low": 1e-6}, "at least 1e-06"),
    ],
)
def test_a_band_says_itself_in_words(settings, words):
    assert str(Band(source="seen", **settings)) == words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "low and high are both null"),
        ({"low": 0.5, "high": 0.4}, "low is 0.5 and high is 0.4"),
        ({"low": 1.0, "source": ""}, "source"),
    ],
)
def test_a_band_that_says_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Band.model_validate({"source": "seen", **settings})


BANDS = {
    "a": [Band(low=0.9, source="table 2"), Band(metric="top5", low=0.99, source="x | y")],
    "b": [Band(high=0.4, source="seen")],
}


def test_a_card_judges_each_band_and_names_what_was_changed():
    changed = {f"train.setting{number}": number for number in range(8)}
    card = reproduction_card("compare", BANDS, {"a": {"top1": 0.95, "top5": 0.98}, "b": {"top1": 0.4}}, changed)
    assert [line["within"] for line in card["lines"]] == [True, False, True]
    assert card["passes"] is False
    assert card["sentence"].startswith(
        "Not as expected: 1 of 3 numbers of compare; 8 settings changed, for which no number is stated ("
    )
    assert card["sentence"].endswith("train.setting5, ...).")
    assert json.loads(json.dumps(card, allow_nan=False)) == card


def test_a_card_of_an_experiment_as_it_is_written():
    card = reproduction_card("demo", {"": [Band(low=0.8, source="seen")]}, {"": {"top1": 0.838}}, {})
    assert card["passes"]
    assert card["sentence"] == "As expected: 1 of 1 number of demo; all settings are those of demo."
    assert card_rows(card) == [("top-1", "at least 80.0 %", "83.8 %", "yes", "seen")]


def test_what_was_not_measured_is_not_judged():
    card = reproduction_card("gamma", {"": [Band(metric="largest_gamma", low=0.1, source="D1")]}, {"": {"top1": 0.5}}, {})
    assert (card["passes"], card["lines"][0]["within"]) == (None, None)
    assert card["sentence"].startswith("Not judged: nothing that gamma states was measured")
    assert card_rows(card)[0][2:4] == ("not measured", "-")


def test_an_experiment_without_numbers_says_so():
    card = reproduction_card("folder", {"": ()}, {"": {"top1": 0.5}}, {"dataset.root": "x"})
    assert card["sentence"] == "folder states no number to reach; 1 setting changed (dataset.root)."
    assert card_markdown(card) == card["sentence"]


def test_the_text_for_mlflow_is_a_table_that_no_source_can_break():
    card = reproduction_card("compare", BANDS, {"a": {"top1": 0.95, "top5": 0.98}, "b": {"top1": 0.3}}, {})
    lines = card_markdown(card).splitlines()
    table = lines[2:]
    assert len(table) == 2 + 3
    assert {line.replace("\\|", "").count("|") for line in table} == {len(CARD_HEADER) + 1}


def test_bands_are_settings_like_others():
    config = apply_overrides(find_experiment("demo")(), {"expected.bands": [{"low": 0.9, "source": "mine"}]})
    assert [str(band) for band in config.expected.bands] == ["at least 90.0 %"]
    with pytest.raises(ConfigError, match=r"expected\.bands\.0\.source"):
        apply_overrides(config, {"expected.bands": [{"low": 0.9}]})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_number_to_reach_in_an_experiments_text_is_judged(name):
    """Who writes "Must reach" or "Reaches" with a share of top-1 also states a band."""
    text, made = find_experiment(name).__doc__ or "", find_experiment(name)()
    stated = made.expected.bands if hasattr(made.expected, "bands") else made.expected
    if "top-1 of" in text.partition("Must reach")[2] + text.partition("Reaches")[2]:
        assert stated
