"""Tests of the leaderboard: order, and commands that say exactly what a trial was."""

import shlex
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from infra.settings import parse_assignments
from tuning.leaderboard import leaderboard, leaderboard_table, rerun_command
from tuning.trials import SearchResult, TrialRecord


def record(number, placement, num_slots, top1, state="completed"):
    overrides = {"model.placement": placement, "train.learning_rate": 0.0312}
    history = [] if top1 is None else [top1]
    return TrialRecord(number, overrides, placement, num_slots, 0.0312, top1, history, len(history), state, 1.0, "")


TRIALS = [
    record(0, "none", 0, 0.5),
    record(1, "all", 10, 0.25, "stopped"),
    record(2, "3a,4e", 2, 0.625),
    record(3, "5b", 1, None, "failed"),
]


def test_rows_are_ranked_and_can_be_rerun():
    rows = leaderboard(SearchResult(TRIALS, TRIALS[2]), "sagsm run demo")
    assert [(row["rank"], row["trial"], row["top1"], row["state"]) for row in rows] == [
        (1, 2, 0.625, "completed"),
        (2, 0, 0.5, "completed"),
        (3, 1, 0.25, "stopped"),
        (4, 3, None, "failed"),
    ]
    assert rows[0] == {
        "rank": 1,
        "trial": 2,
        "placement": "3a,4e",
        "slots": 2,
        "learning_rate": 0.0312,
        "settings": {"train.learning_rate": 0.0312},
        "top1": 0.625,
        "cost": None,
        "epochs": 1,
        "state": "completed",
        "command": "sagsm run demo --set search.num_trials=0 --set model.placement=3a,4e --set train.learning_rate=0.0312",
    }


def test_no_trials_make_an_empty_leaderboard():
    assert leaderboard(SearchResult([], None), "sagsm run demo") == []


values = st.one_of(
    st.floats(1e-12, 1e12, allow_nan=False).map(lambda value: float(f"{value:.3g}")),
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12),
    st.sampled_from(["none", "all", "3a,4e", "4e", "no", "null", "1e3", "it's", "$HOME", "a b", "0x10", ""]),
)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}\.[a-z_]{1,5}", fullmatch=True), values, max_size=3))
def test_a_command_says_exactly_the_overrides_through_shell_and_yaml(overrides):
    words = shlex.split(rerun_command("sagsm run demo", overrides))
    assert words[:3] == ["sagsm", "run", "demo"]
    assert words[3::2] == ["--set"] * (len(overrides) + 1)
    assert parse_assignments(words[4::2]) == {"search.num_trials": 0, **overrides}


def test_the_table_shows_every_trial():
    _, rows = leaderboard_table(leaderboard(SearchResult(TRIALS, TRIALS[2]), "sagsm run demo"))
    assert len(rows) == len(TRIALS)
    assert {"62.5", "50.0", "25.0", "3a,4e", "none", "stopped", "failed", "0.0312"} <= {cell for row in rows for cell in row}


def test_each_setting_and_the_cost_have_a_column_and_gaps_are_shown():
    trials = [
        replace(
            TRIALS[2], overrides={"model.placement": "3a,4e", "model.scope": "joint", "train.num_segments": 16}, cost=1234.5
        ),
        replace(TRIALS[0], overrides={"model.placement": "none", "train.num_segments": 8}, cost=600.0),
    ]
    rows = leaderboard(SearchResult(trials, trials[0]), "sagsm run demo")
    assert [row["settings"] for row in rows] == [
        {"model.scope": "joint", "train.num_segments": 16},
        {"model.scope": None, "train.num_segments": 8},
    ]
    header, cells = leaderboard_table(rows)
    assert header[4:8] == ["scope", "num segments", "top-1 %", "cost"]
    assert [row[4:8] for row in cells] == [["joint", "16", "62.5", "1234"], ["-", "8", "50.0", "600"]]
    assert "cost" not in leaderboard_table(leaderboard(SearchResult(TRIALS, None), "x"))[0]
