"""What a trained network says of many videos: Ray tasks, and one Parquet file with a row for every video.

path            string         as it was found
status          string         "ok" or "rejected"
reason, detail  string         why a video was rejected: a code of preprocessing/FORMAT.md, and what was found; else ""
classes         list<string>   the most probable classes, best first; null if rejected, as the next two
probabilities   list<float>    theirs
scores          list<float>    of all classes; the file's metadata holds their names as JSON, under "sagsm.label_names"
"""

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import cluster
from infra.errors import ConfigError, DataError
from infra.progress import OnProgress
from infra.storage import atomic_path
from pipelines.predict import Prediction, Predictor, is_folder, load_predictor
from preprocessing.frames import is_frame_folder

PREDICTION_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("classes", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
    ]
)
# Small enough that all workers end at about the same time, and so few in all that keeping watch over them costs nothing.
_LEAST_VIDEOS_A_TASK = 8
_MOST_TASKS = 2048


def holds_videos(path: Path) -> bool:
    """Whether a path is a folder of videos, as against a video: a file, or a folder of numbered JPEG files.

    Raises:
        OSError: if the folder cannot be read.
    """
    return is_folder(path) and not is_frame_folder(path)


def find_videos(places: Sequence[Path]) -> list[Path]:
    """The videos among files and folders: as given, and those of a folder and its folders sorted by path.

    Of a folder of videos everything that is not hidden counts, since a file that is no video deserves a row that says so.
    Links to folders are not followed.

    Raises:
        DataError: if there is none.
        OSError: if a folder cannot be read.
    """
    found = [video for place in places for video in (_videos_in(place) if holds_videos(place) else [place])]
    if not found:
        raise DataError(f"{', '.join(map(str, places))}: no file in there; expected videos or folders of numbered JPEG files")
    return found


def predict_to_parquet(
    model: Path, videos: Sequence[Path], output: Path, top: int, on_progress: OnProgress | None = None
) -> dict[str, int]:
    """Ask about all videos on the connected cluster and write their rows in the order of `videos`; the file appears whole.

    Each worker loads the network once. Neither it nor this process holds more than a task's videos at a time, the rest waits on
    the disk of `output`. Paths must be visible under the same names on every node.

    Args:
        model: a folder for `load_predictor`.
        videos: from `find_videos`.
        output: a Parquet file; one that is there is replaced.
        top: how many classes a row names.
        on_progress: called with the videos that are done and their number.

    Returns:
        How many videos were "ok", and how many were rejected by reason.

    Raises:
        ConfigError: if the folder of `output` does not exist.
        DataError: if there is no model in `model`.
        ClusterError: if a worker process died three times.
    """
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.absolute().parent}; make it, or choose another")
    size = max(_LEAST_VIDEOS_A_TASK, -(-len(videos) // _MOST_TASKS))
    tasks = [videos[start : start + size] for start in range(0, len(videos), size)]
    arguments = [{"model": model.absolute(), "videos": [path.absolute() for path in task], "top": top} for task in tasks]
    have = cluster.resources()
    share_of_gpu = min(1.0, have["GPU"] / max(1.0, have["CPU"]))
    counts: Counter[str] = Counter()
    done = 0
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".tmp-predict-") as folder:
        parts = [Path(folder) / f"{number}.parquet" for number in range(len(tasks))]
        for number, table in cluster.call_each(_predict_some, num_cpus=1.0, num_gpus=share_of_gpu, arguments=arguments):
            table = table.set_column(0, "path", pa.array([Prediction.readable(path) for path in tasks[number]]))
            pq.write_table(table, parts[number])
            counts.update(reason or "ok" for reason in table["reason"].to_pylist())
            done += table.num_rows
            if on_progress is not None:
                on_progress(done, len(videos), f"{done - counts['ok']:,} rejected")
        _join(parts, output)
    return dict(counts)


def _predict_some(model: Path, videos: Sequence[Path], top: int) -> pa.Table:
    """In a worker: rows of `PREDICTION_SCHEMA`, with the names of all classes as metadata."""
    predictor = _loaded(model)
    rows = [_row(predictor, predictor.predict(path), top) for path in videos]
    names = json.dumps(predictor.label_names).encode()
    return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA.with_metadata({b"sagsm.label_names": names}))


@functools.lru_cache(maxsize=1)
def _loaded(model: Path) -> Predictor:
    """Kept between the tasks of a worker."""
    return load_predictor(model)


def _row(predictor: Predictor, prediction: Prediction, top: int) -> dict[str, Any]:
    row = predictor.describe(prediction, top)
    best = row.pop("top")
    if prediction.logits is None:
        return row
    chosen = {"classes": [entry["class"] for entry in best], "probabilities": [entry["probability"] for entry in best]}
    return row | chosen | {"scores": prediction.scores}


def _join(parts: Sequence[Path], output: Path) -> None:
    with atomic_path(output) as temporary, pq.ParquetWriter(temporary, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


def _videos_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_symlink() and holds_videos(path):
            yield from _videos_in(path)
        else:
            yield path
