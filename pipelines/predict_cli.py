"""`sagsm predict`: ask a trained network about videos."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import DataError, PipelineError
from pipelines.printing import print_json, print_table


def predict(
    videos: Annotated[
        list[Path], typer.Argument(metavar="VIDEO...", help="Video files, or folders of JPEG frames (00001.jpg, ...).")
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="PATH", help="The folder of a train stage, as `sagsm plan` names it with --json.")
    ],
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many classes to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Show the most probable classes of videos, by the network of a finished training; exit code 2 when a video is broken.

    Example: sagsm predict --model work/store/train/0123456789abcdef clip.mp4
    """
    from pipelines.predict import load_predictor

    try:
        predictor = load_predictor(Path(model))
        found = [predictor.describe(predictor.predict(video), top) for video in videos]
    except OSError as error:
        raise PipelineError(f"{error}; check the path, its permissions and the free space, then run again") from error
    if as_json:
        print_json({"model": model, "videos": found})
    elif rows := [row for video in found for row in _rows(video)]:
        print_table(("video", "rank", "class", "probability"), rows)
    broken = [f"{video['path']} ({video['reason']}: {video['detail']})" for video in found if video["status"] == "rejected"]
    if broken:
        raise DataError(
            f"{len(broken)} of {len(found)} videos cannot be used: {'; '.join(broken)}; expected video files that ffmpeg can "
            "read, or folders of frames named 00001.jpg, 00002.jpg, ...; preprocessing/FORMAT.md explains the reasons"
        )


def _rows(video: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (video["path"], str(rank), best["class"], f"{best['probability']:.1%}")
        for rank, best in enumerate(video["top"], start=1)
    ]
