"""`sagsm predict`: ask a trained network about some videos, or about many on Ray."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.errors import ConfigError, DataError, PipelineError
from pipelines.printing import print_json, print_table

if TYPE_CHECKING:
    from pipelines.predict import Prediction, Predictor


def predict(
    videos: Annotated[
        list[Path],
        typer.Argument(
            metavar="VIDEO...",
            help="Video files, or folders of JPEG frames (00001.jpg, ...); with --output also folders of videos.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="PATH|models:/NAME@ALIAS",
            help="The folder of a train stage, as `sagsm plan --json` names it, or a network in MLflow's registry.",
        ),
    ],
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many classes to show.")] = 5,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE.parquet", help="Ask on Ray; a row for every video, broken ones with a reason."),
    ] = None,
    film: Annotated[
        Path | None,
        typer.Option(
            "--film", metavar="FILE.mp4|FILE.gif", help="Of one video: a film of where the network's attention looks."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDR", help="A running Ray cluster; otherwise one starts on this machine."),
    ] = None,
    workdir: Annotated[Path, typer.Option("--workdir", metavar="DIR", help="Holds the embedded MLflow.")] = Path("work"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Show the most probable classes of videos, by the network of a finished training; exit code 2 when a video is broken.

    Example: sagsm predict --model models:/sagsm-demo@newest clip.mp4
    """
    try:
        _require_one_video_a_film(film, videos, output)
        with _files(model, workdir) as files:
            if output is not None:
                _predict_many(files, videos, output, top, address, as_json)
            else:
                _predict_some(files, videos, top, as_json, film)
    except OSError as error:
        raise PipelineError(f"{error}; check the path, its permissions and the free space, then run again") from error


@contextmanager
def _files(model: str, workdir: Path) -> Iterator[Path]:
    """The folder of the network's files; those of a registered one are fetched for as long as the block lasts."""
    if not model.startswith("models:/"):
        with _in_use(Path(model)):
            yield Path(model)
        return
    from infra.tracking import download_model, tracking_uri

    # In the work directory, since workers on other nodes must see them too.
    with tempfile.TemporaryDirectory(prefix=".tmp-model-", dir=workdir if workdir.is_dir() else None) as folder:
        yield download_model(tracking_uri(workdir), model, Path(folder))


def _in_use(model: Path) -> AbstractContextManager[None]:
    """Of a network that lies in a store: keeps it from being removed."""
    from pipelines.artifacts import is_artifact
    from pipelines.leases import in_use

    folder = model.absolute().parent
    return in_use([folder] if is_artifact(folder) else [], "sagsm predict")


def _require_one_video_a_film(film: Path | None, videos: list[Path], output: Path | None) -> None:
    """Before anything is loaded or computed."""
    if film is None:
        return
    from pipelines.evaluation.films import require_film_name

    if output is not None or len(videos) != 1:
        found = "--output FILE.parquet" if output is not None else f"{len(videos)} videos"
        raise ConfigError(f"--film shows one video, but was given together with {found}; give one video, and no --output")
    require_film_name(film)
    if not film.absolute().parent.is_dir():
        raise ConfigError(f"--film {film}: there is no folder {film.absolute().parent}; make it, or choose another")


def _predict_some(model: Path, videos: list[Path], top: int, as_json: bool, film: Path | None) -> None:
    from pipelines.batch_predict import holds_videos
    from pipelines.predict import load_predictor

    for video in videos:
        if holds_videos(video):
            raise ConfigError(
                f"{video} is a folder without frames named 00001.jpg, 00002.jpg, ...; if it holds videos, say with --output "
                "FILE.parquet where their predictions go"
            )
    predictor = load_predictor(model)
    asked = [predictor.predict(video) for video in videos] if film is None else [_film(predictor, videos[0], film)]
    found = [predictor.describe(prediction, top) for prediction in asked]
    is_filmed = film is not None and asked[0].logits is not None
    if as_json:
        print_json({"videos": found} | ({"film": str(film)} if is_filmed else {}))
    elif rows := [row for video in found for row in _rows(video)]:
        print_table(("video", "rank", "class", "probability"), rows)
        if is_filmed:
            print(f"film: {film}")
    broken = [f"{video['path']} ({video['reason']}: {video['detail']})" for video in found if video["status"] == "rejected"]
    if broken:
        raise DataError(
            f"{len(broken)} of {len(found)} videos cannot be used: {'; '.join(broken)}; expected video files that ffmpeg can "
            "read, or folders of frames named 00001.jpg, 00002.jpg, ...; preprocessing/FORMAT.md explains the reasons"
        )


def _film(predictor: "Predictor", video: Path, film: Path) -> "Prediction":
    """Ask about a video and, unless it is broken, write its film."""
    from pipelines.evaluation.films import save_film

    prediction, clip = predictor.watch(video)
    if clip is not None:
        save_film(film, [clip])
    return prediction


def _predict_many(model: Path, places: list[Path], output: Path, top: int, address: str | None, as_json: bool) -> None:
    from infra import cluster
    from infra.progress import StageProgress
    from pipelines.batch_predict import find_videos, predict_to_parquet

    videos = find_videos(places)
    with cluster.session(address), StageProgress() as progress:
        counts = predict_to_parquet(model, videos, output, top, progress.for_stage("predict"))
    num_ok = counts.pop("ok", 0)
    if as_json:
        print_json({"output": str(output), "ok": num_ok, "rejected": len(videos) - num_ok, "by_reason": counts})
        return
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "none"
    print(f"{output}: {len(videos):,} videos, of which rejected: {reasons}")


def _rows(video: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (video["path"], str(rank), best["class"], f"{best['probability']:.1%}")
        for rank, best in enumerate(video["top"], start=1)
    ]
