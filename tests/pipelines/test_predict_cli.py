"""`sagsm predict`: what it prints, and that a broken video is one message with exit code 2."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.errors import ConfigError, DataError
from pipelines.cli import app
from pipelines.predict import load_predictor
from preprocessing.synthetic import LABEL_NAMES

README = Path(__file__).parents[2] / "README.md"
SAGSM = str(Path(sys.executable).with_name("sagsm"))


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["predict", *map(str, arguments)])


def test_the_table_and_the_document_say_the_same(asked):
    videos = [asked.raw / "film.webm", asked.raw / "frames"]
    printed = invoke("--model", asked.artifact, *videos, "--top", 3)
    document = json.loads(invoke("--model", asked.artifact / "model", *videos, "--top", 3, "--json").stdout)
    lines = printed.stdout.splitlines()
    assert lines[0].split() == ["video", "rank", "class", "probability"]
    assert len(lines) == 1 + 6
    assert [video["path"] for video in document["videos"]] == [str(video) for video in videos]
    predictor = load_predictor(asked.artifact)
    for video, path in zip(document["videos"], videos, strict=True):
        assert video["status"] == "ok"
        expected = predictor.predict(path).top(3)
        assert [(best["label"], best["class"]) for best in video["top"]] == [
            (label, LABEL_NAMES[label]) for label, _ in expected
        ]
        assert [best["probability"] for best in video["top"]] == pytest.approx([score for _, score in expected])
        for rank, best in enumerate(video["top"], start=1):
            words = f"{path} {rank} {best['class']} {best['probability']:.1%}".split()
            assert words in [line.split() for line in lines]


def test_a_broken_video_is_named_after_the_others_were_answered(asked, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    result = invoke("--model", asked.artifact, asked.raw / "frames", tmp_path / "text.mp4", "--json")
    assert isinstance(result.exception, DataError)
    message = str(result.exception)
    assert message.startswith(f"1 of 2 videos cannot be used: {tmp_path / 'text.mp4'} (undecodable: ")
    assert [video["status"] for video in json.loads(result.stdout)["videos"]] == ["ok", "rejected"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_film_comes_with_the_same_answer(attending, tmp_path, suffix):
    film, video = tmp_path / f"film{suffix}", attending.raw / "film.avi"
    asked = ["--model", attending.artifact, video, "--top", 2]
    plain, filmed = invoke(*asked), invoke(*asked, "--film", film)
    assert filmed.stdout == f"{plain.stdout}film: {film}\n"
    again = tmp_path / f"again{suffix}"
    document = json.loads(invoke(*asked, "--film", again, "--json").stdout)
    assert document == {**json.loads(invoke(*asked, "--json").stdout), "film": str(again)}
    assert film.read_bytes() == again.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([film.name, again.name])


def test_a_film_that_cannot_be_is_refused(asked, attending, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    one, two = attending.raw / "film.avi", attending.raw / "film.mp4"
    cases = [
        (asked, [one, "--film", tmp_path / "x.gif"], ConfigError, "the network has no attention in any slot"),
        (attending, [one, two, "--film", tmp_path / "x.gif"], ConfigError, "shows one video, .* together with 2 videos"),
        (attending, [one, "--output", tmp_path / "x.parquet", "--film", tmp_path / "x.gif"], ConfigError, "with --output"),
        (attending, [one, "--film", tmp_path / "x.avi"], ConfigError, r"has the suffix .avi; .* as .mp4 or .gif"),
        (attending, [one, "--film", tmp_path / "x"], ConfigError, "has no suffix"),
        (attending, [one, "--film", tmp_path / "none" / "x.mp4"], ConfigError, "there is no folder .*none; make it"),
        (attending, [tmp_path / "text.mp4", "--film", tmp_path / "x.mp4"], DataError, "1 of 1 videos cannot be used"),
        (attending, [attending.raw, "--film", tmp_path / "x.mp4"], ConfigError, "is a folder without frames"),
    ]
    for network, arguments, kind, message in cases:
        result = invoke("--model", network.artifact, *arguments)
        assert isinstance(result.exception, kind), (arguments, result.exception)
        assert re.search(message, str(result.exception))
    assert [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


def test_the_readme_uses_options_that_there_are():
    lines = re.findall(r"^ +sagsm (predict .*?)(?:  #.*)?$", README.read_text(), re.MULTILINE)
    assert len(lines) >= 3
    known = set(re.findall(r"--[a-z-]+", invoke("--help").stdout))
    assert {option for line in lines for option in re.findall(r"--[a-z-]+", line)} <= known


@pytest.mark.slow
def test_the_program_ends_with_2_and_without_a_traceback(asked, tmp_path):
    (tmp_path / "empty.mp4").touch()
    for model, video, words in (
        (asked.artifact, tmp_path / "empty.mp4", "empty.mp4 (empty: the file has 0 bytes)"),
        (tmp_path, asked.raw / "film.avi", f"error: {tmp_path} holds no model"),
    ):
        done = subprocess.run([SAGSM, "predict", "--model", model, video], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert "Traceback" not in done.stderr
