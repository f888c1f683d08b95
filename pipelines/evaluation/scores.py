"""The scores of each clip as a file, with all that is needed to judge them and to set them beside others.

`scores.parquet` has a row a clip: key, label (null if unlabelled), scores (list of K floats that sum to 1). Its schema's
metadata says what they are of: `label_passport`, `label_names` (a JSON list), `split` and `protocol`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import DataError
from infra.storage import atomic_path
from pipelines.evaluation.metrics import summarise
from preprocessing.labels import label_passport

_ROUNDING = 1e-4  # by how much the scores of a clip may miss 1: other programs write float32
_AGAIN = "write it again: sagsm run EXPERIMENT --only evaluate"


@dataclass(frozen=True)
class Origin:
    """What scores are of.

    Attributes:
        label_names: of the classes, in the order of the scores.
        split: of the shard set.
        protocol: which views of a video were averaged; of an ensemble what its members say.
    """

    label_names: tuple[str, ...]
    split: str
    protocol: str

    @property
    def label_passport(self) -> str:
        """Stands for the label names; see `preprocessing.labels`."""
        return label_passport(self.label_names)


@dataclass(frozen=True)
class ClipScores:
    """What a network, or several, say of each clip, as it is kept in a file.

    Attributes:
        keys: of the videos, each once.
        labels: class ids, -1 if unlabelled. Shape: [N].
        scores: float64, after softmax. Shape: [N, K].
        origin: what they are of.
    """

    keys: list[str]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    origin: Origin

    def summarise(self) -> dict[str, Any]:
        """Accuracies, intervals, confusions and tables; see `metrics.summarise`. A score of 0 counts as the least number."""
        least = np.finfo(np.float64).smallest_subnormal
        return summarise(np.log(np.maximum(self.scores, least)), self.labels, list(self.origin.label_names))

    def save(self, path: Path) -> None:
        """Write `path`, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        num_clips, num_classes = self.scores.shape
        offsets = pa.array(np.arange(num_clips + 1) * num_classes, pa.int32())
        table = pa.table(
            {
                "key": pa.array(self.keys, pa.string()),
                "label": pa.array(self.labels, pa.int32(), mask=self.labels < 0),
                "scores": pa.ListArray.from_arrays(offsets, pa.array(self.scores.ravel(), pa.float64())),
            }
        )
        facts = {
            "label_passport": self.origin.label_passport,
            "label_names": json.dumps(self.origin.label_names),
            "split": self.origin.split,
            "protocol": self.origin.protocol,
        }
        with atomic_path(path) as temporary:
            pq.write_table(table.replace_schema_metadata(facts), temporary)


def read_scores(path: Path) -> ClipScores:
    """Read what `ClipScores.save` wrote.

    Raises:
        DataError: if it cannot be read, does not say what it is of, or holds what are no scores; names the file.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["key", "label", "scores"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as scores: {str(error).partition(chr(10))[0]}; expected a scores.parquet that `evaluate` "
            "wrote, with the columns key, label and scores"
        ) from error
    origin = _origin(path, table.schema.metadata or {})
    lists = table["scores"].combine_chunks()
    num_classes = len(origin.label_names)
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    if (lengths != num_classes).any():
        found = sorted(set(lengths.tolist()) - {num_classes})[0]
        raise DataError(f"{path} has a clip with {found} scores; expected {num_classes}, a score a label name; {_AGAIN}")
    scores = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(lists), num_classes)
    labels = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    keys: list[str] = table["key"].to_pylist()
    _require_scores(path, keys, scores)
    return ClipScores(keys, labels, scores, origin)


def _origin(path: Path, metadata: dict[bytes, bytes]) -> Origin:
    facts = {name.decode(): value.decode() for name, value in metadata.items()}
    missing = [name for name in ("label_passport", "label_names", "split", "protocol") if name not in facts]
    if missing:
        raise DataError(
            f"{path} does not say its {', '.join(missing)}: an earlier version wrote it, or another program; {_AGAIN}"
        )
    origin = Origin(tuple(json.loads(facts["label_names"])), facts["split"], facts["protocol"])
    if origin.label_passport != facts["label_passport"]:
        raise DataError(
            f"{path} has label passport {facts['label_passport']}, but its label names have {origin.label_passport}; {_AGAIN}"
        )
    return origin


def _require_scores(path: Path, keys: list[str], scores: npt.NDArray[np.float64]) -> None:
    if not keys or len(set(keys)) != len(keys):
        raise DataError(f"{path} has {len(keys)} clips of {len(set(keys))} videos; expected each once, at least one; {_AGAIN}")
    # Written so that NaN, which is in no relation to any number, counts as bad.
    bad = ~((scores >= 0).all(axis=1) & (np.abs(scores.sum(axis=1) - 1) < _ROUNDING))
    if bad.any():
        first = int(bad.argmax())
        raise DataError(
            f"{path}: the scores of {int(bad.sum())} of {len(keys)} clips, the first is {keys[first]}, are no numbers from 0 "
            f"to 1 that sum to 1 (sum {scores[first].sum():g}); {_AGAIN}"
        )
