from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.figures import draw_confusion, draw_curves, draw_search
from pipelines.evaluation.metrics import summarise
from pipelines.reports.report import doubts, verdict, write_report
from pipelines.reproduction import Band, reproduction_card


def make_evaluation(names: list[str], num_clips: int, num_right: int, split: str = "validation") -> dict[str, Any]:
    labels = np.arange(num_clips) % len(names)
    answers = np.where(np.arange(num_clips) < num_right, labels, (labels + 1) % len(names))
    return summarise(np.eye(len(names), dtype=np.float32)[answers] * 4, labels, names) | {"split": split}


def make_history(num_epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 2 / (epoch + 1),
            "train_top1": epoch / num_epochs,
            "val_loss": None if epoch % 2 else 2 / (epoch + 1),
            "val_top1": None if epoch % 2 else epoch / num_epochs,
            "learning_rate": 0.01,
            "gammas": {"3a": 0.01 * epoch, "4e": -0.02 * epoch},
        }
        for epoch in range(num_epochs)
    ]


def make_card(source: str, top1: float = 0.75) -> dict[str, Any]:
    return reproduction_card("demo", {"": [Band(low=0.8, source=source)]}, {"": {"top1": top1}}, {"train.epochs": 5})


def make_trials(names: list[str]) -> list[dict[str, Any]]:
    common = {"slots": 2, "learning_rate": 0.01, "epochs": 3, "state": "completed"}
    command = f"sagsm run '{names[0]}' --set search.num_trials=0"
    return [
        {**common, "rank": 1, "trial": 1, "placement": "3a,4e", "top1": 0.8, "command": command},
        {**common, "rank": 2, "trial": 0, "placement": "none", "top1": None, "state": "failed", "command": command},
    ]


@pytest.fixture
def report(tmp_path: Path, hostile_names: list[str]) -> Path:
    evaluation = make_evaluation(hostile_names, 32, 24)
    trials = make_trials(hostile_names)
    figures = {
        "curves": draw_curves(tmp_path / "curves.png", make_history(5), 0.125),
        "confusion": draw_confusion(tmp_path / "confusion.png", evaluation["confusion"], hostile_names),
        "search": draw_search(tmp_path / "search.png", trials),
    }
    return write_report(
        tmp_path,
        title=f"demo {hostile_names[0]}",
        stages=[
            {"name": "train", "status": "ran", "seconds": 130.0, "fingerprint": "ab12"},
            {"name": "index", "status": "cached", "seconds": None, "fingerprint": "cd34"},
        ],
        dataset={"name": "diving48", "counts": {"kept": 3}, "label_names": hostile_names},
        search={"trials": trials},
        history=make_history(5),
        evaluation=evaluation,
        card=make_card(hostile_names[0]),
        figures=figures,
        config_yaml=f"title: {hostile_names[2]}\n",
        links={"MLflow": "http://127.0.0.1:5000/#/experiments/1", "evil": "javascript:alert(1)"},
    )


def test_the_page_says_what_came_out_first(report: Path, read_page: Callable[[Path], Any]) -> None:
    assert report.name == "index.html"
    page = read_page(report)
    text = " ".join(" ".join(page.text).split())
    order = [
        text.index(part)
        for part in (
            "Top-1 is 75.0 % on 32 validation clips of 8 classes",
            "chance is 12.5 %",
            "Not as expected: 1 of 1 number of demo; 1 setting changed",
            "at least 80.0 %",
            "What to distrust",
            "Trials",
            "Stages",
        )
    ]
    assert order == sorted(order)
    for part in ("sagsm run", "2.2 min", "cached", "+0.0400", "-0.0800", "counts.kept", "Worst pairs", "mean class accuracy"):
        assert part in text
    for part in ("calibration error", "Mean confidence", "Left and right: 2 classes are the mirror image of another one."):
        assert part in text
    assert page.tags.count("img") == 3


def test_names_from_data_stay_text(report: Path, read_page: Callable[[Path], Any], hostile_names: list[str]) -> None:
    text = "".join(read_page(report).text)
    for name in hostile_names[:5]:
        assert name in text
    assert "javascript:alert(1)" in text  # shown, not linked: the reader of the page checks every href


def test_the_same_results_give_the_same_bytes(tmp_path: Path, hostile_names: list[str]) -> None:
    evaluation = make_evaluation(hostile_names, 16, 8)
    pages = []
    for _ in range(2):
        figure = draw_confusion(tmp_path / "c.png", evaluation["confusion"], hostile_names)
        page = write_report(
            tmp_path, title="t", stages=[], dataset={}, search=None, history=[], evaluation=evaluation,
            card=make_card("seen"), figures={"confusion": figure}, config_yaml="", links={},
        )  # fmt: skip
        pages.append(page.read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("num_right", "split", "num_trials", "expected"),
    [
        (4, "test", 0, "Guessing (12.5 %) is inside the interval"),
        (32, "train", 0, "The clips were trained on"),
        (32, "validation", 20, "the best of 20 trials and the best epoch were also chosen"),
        (32, "validation", 0, "the best epoch was also chosen"),
        (32, "test", 0, "One seed."),
        (32, "test", 0, "Only 32 clips: one clip more or less is 3.1 %"),
    ],
)
def test_doubts_fit_the_numbers(hostile_names: list[str], num_right: int, split: str, num_trials: int, expected: str) -> None:
    found = doubts(make_evaluation(hostile_names, 32, num_right, split), num_trials=num_trials)
    assert any(expected in doubt for doubt in found), found


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("centre", "One view a clip: the centre frames and the centre crop."),
        ("10x3", "The mean over 30 views of a video (10 in time, 3 in space)"),
        ("seed_code", "One random view a clip, without mean and deviation, as the published code validates"),
    ],
)
def test_doubts_say_what_was_shown(hostile_names: list[str], protocol: str, expected: str) -> None:
    found = doubts(make_evaluation(hostile_names, 32, 20) | {"protocol": protocol}, num_trials=0)
    assert found[-1].startswith(expected)


def test_a_good_result_on_a_test_split_is_not_called_chance(hostile_names: list[str]) -> None:
    found = " ".join(doubts(make_evaluation(hostile_names, 400, 390, "test"), num_trials=20))
    for word in ("Guessing", "commonest", "chosen", "Only"):
        assert word not in found


def test_absent_classes_and_unlabelled_clips_are_named() -> None:
    evaluation = summarise(np.zeros((3, 3), np.float32), np.array([0, 0, -1]), ["a", "b", "c"])
    found = " ".join(doubts(evaluation, num_trials=0))
    assert "Classes without a clip here, left out of the mean class accuracy: 2 (b, c)." in found
    assert "Clips without a label, left out: 1." in found
    assert verdict(evaluation) == "Top-1 is 100.0 % on 2 clips of 3 classes; chance is 33.3 %."
