"""How far an accuracy, or a difference of two, can be told from noise: intervals over clips and seeds, and a verdict in words.

Two things are random: which clips the split holds, and what another seed of the training would have given.

Clips are drawn by the Bayesian bootstrap (Rubin 1981), paired: both networks are judged on the same drawn clips. It is drawn
in the form that needs no loop over clips: only how often each score occurs matters. Half a clip is added at either end of the
scale, which keeps an interval from being empty where all clips score the same; for one network with one seed the interval is
then Jeffreys' (Brown, Cai and DasGupta 2001).

Seeds are too few for a bootstrap: to draw two or three of them again gives too little spread, by the factor (S - 1) / S in
the variance, and no tails. Their part of a draw comes from Student's t instead, with the spread that the seeds show; that of
two networks is pooled. It includes a little of the clips' noise, so that intervals are rather too wide than too narrow. With a
single seed there is nothing to go by: the interval then covers the clips alone, and the words say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import PipelineError

_CONFIDENCE = 0.95
_NUM_DRAWS = 10_000
_HALF_A_CLIP = 0.5

Hits = npt.NDArray[np.bool_]
"""Whether each clip is right. Shape: [S, N] for S seeds and N clips, in the same order for all that is compared."""


@dataclass(frozen=True)
class Difference:
    """What separates a network from its baseline.

    Attributes:
        top1: its top-1 less that of the baseline, means over seeds.
        interval: of `top1`, 95 %.
        mcnemar: for each seed that both have, by position, the p-value of McNemar's exact test.
        num_seeds: of the one that has fewer.
        separable: whether noise can be ruled out as the reason: of clips, and of seeds where there are several.
    """

    top1: float
    interval: tuple[float, float]
    mcnemar: tuple[float, ...]
    num_seeds: int
    separable: bool

    def sentence(self, name: str, baseline: str) -> str:
        """The verdict.

        Example:
            >>> Difference(0.1, (0.06, 0.14), (0.0004,), 1, True).sentence("tsm", "tsn")
            'tsm is 10.0 points above tsn (6.0 to 14.0): separable from the noise of clips; one seed each, so that the noise \
of seeds is not known.'
        """
        side = "above" if self.top1 > 0 else "below"
        low, high = sorted((self.interval[0], self.interval[1]), key=abs) if self.separable else self.interval
        if self.separable and self.top1 < 0:
            low, high = abs(low), abs(high)
        size = f"{100 * abs(self.top1):.1f} points {side}" if self.top1 else "level with"
        found = f"{name} is {size} {baseline} ({100 * low:.1f} to {100 * high:.1f})"
        word = "separable from" if self.separable else "not separable from"
        if self.num_seeds == 1:
            return f"{found}: {word} the noise of clips; one seed each, so that the noise of seeds is not known."
        return f"{found}: {word} the noise of clips and of {self.num_seeds} seeds."


def read_hits(scores: Mapping[str, Path]) -> dict[str, npt.NDArray[np.bool_]]:
    """Whether each labelled clip is right, by training: bool [N], clips in the order of their keys.

    Args:
        scores: for each training, by a name for messages, the `scores.parquet` that `Scores.save` wrote.

    Raises:
        PipelineError: if they are not of the same clips.
    """
    import pyarrow.parquet as pq

    hits: dict[str, npt.NDArray[np.bool_]] = {}
    first_clips: list[Any] | None = None
    for name, path in scores.items():
        table = pq.read_table(path).sort_by("key")
        table = table.filter(table["label"].is_valid())
        clips = [table["key"].to_pylist(), table["label"].to_pylist()]
        first_clips = first_clips or clips
        if clips != first_clips:
            raise PipelineError(
                f"{name} was judged on other clips or labels than {next(iter(hits))}: found {table.num_rows}, expected the "
                f"same {len(first_clips[0])}; run them in one --workdir"
            )
        hits[name] = np.stack(table["scores"].to_numpy()).argmax(axis=1) == np.array(clips[1])
    return hits


def top1_interval(hits: Hits) -> tuple[float, float]:
    """The 95 % interval of a network's top-1, over clips and, with several seeds, over seeds.

    Args:
        hits: see `Hits`.
    """
    _require_shape(hits)
    rng = np.random.default_rng(0)
    draws = _draw_clips(rng, hits.mean(axis=0), low=0.0) + _draw_seeds(rng, [hits])
    low, high = _middle(draws)
    return max(0.0, low), min(1.0, high)


def class_accuracy_interval(num_right: npt.NDArray[np.int64], num_clips: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The 95 % interval of a mean class accuracy, over clips within each class.

    A class's draw is Beta distributed, which is what the Bayesian bootstrap of its clips comes to. The half clip at either end
    of the scale is shared by all classes: a whole one for each would pull rare classes to the middle.

    Args:
        num_right: of each class that has clips. Shape: [K].
        num_clips: of each, at least 1. Shape: [K].
    """
    share, shape = _HALF_A_CLIP / len(num_clips), (_NUM_DRAWS, len(num_clips))
    draws = np.random.default_rng(0).beta(num_right + share, num_clips - num_right + share, size=shape)
    low, high = _middle(draws.mean(axis=1))
    found = float((num_right / num_clips).mean())
    return min(low, found), max(high, found)  # where all clips are right, all draws are below


def difference(hits: Hits, baseline: Hits) -> Difference:
    """Compare a network with its baseline on the same clips.

    With one seed, "separable" asks for both an interval without 0 and McNemar's p below 5 %, which is exact where few clips
    differ. With several, the interval decides, since the seeds' p-values do not know of each other.

    Args:
        hits: of the network; see `Hits`.
        baseline: of the baseline, which may have another number of seeds.

    Raises:
        PipelineError: if the numbers of clips differ.
    """
    _require_shape(hits)
    _require_shape(baseline)
    if hits.shape[1] != baseline.shape[1]:
        raise PipelineError(f"found scores of {hits.shape[1]} and of {baseline.shape[1]} clips; expected the same clips")
    rng = np.random.default_rng(0)
    scores = hits.mean(axis=0) - baseline.mean(axis=0)
    low, high = _middle(_draw_clips(rng, scores, low=-1.0) + _draw_seeds(rng, [hits, baseline]))
    p_values = tuple(mcnemar(ours, theirs) for ours, theirs in zip(hits, baseline, strict=False))
    num_seeds = min(len(hits), len(baseline))
    separable = (low > 0 or high < 0) and (num_seeds > 1 or p_values[0] < 1 - _CONFIDENCE)
    return Difference(float(scores.mean()), (low, high), p_values, num_seeds, bool(separable))


def mcnemar(hits: npt.NDArray[np.bool_], baseline: npt.NDArray[np.bool_]) -> float:
    """The p-value of McNemar's exact test: could the clips that only one of two networks gets right be shared by a coin?

    Args:
        hits: whether each clip is right. Shape: [N].
        baseline: likewise, of the same clips.

    Example:
        >>> mcnemar(np.array([True] * 8 + [False]), np.array([False] * 8 + [False]))
        0.0078125
    """
    from scipy.stats import binom

    num_gained, num_lost = int((hits & ~baseline).sum()), int((~hits & baseline).sum())
    return min(1.0, 2 * float(binom.cdf(min(num_gained, num_lost), num_gained + num_lost, 0.5)))


def _draw_clips(rng: np.random.Generator, scores: npt.NDArray[np.float64], low: float) -> npt.NDArray[np.float64]:
    """Means of scores between `low` and 1 over clips as they might have been drawn. Shape: [N] to [draws]."""
    values, counts = np.unique(np.concatenate([scores, [low, 1.0]]), return_counts=True)
    weights = counts.astype(np.float64)
    weights[[0, -1]] -= _HALF_A_CLIP
    draws: npt.NDArray[np.float64] = rng.dirichlet(weights, size=_NUM_DRAWS) @ values
    return draws


def _draw_seeds(rng: np.random.Generator, networks: list[Hits]) -> npt.NDArray[np.float64]:
    """How far the mean over these seeds may lie from that over all seeds; 0 if a network has one seed. Shape: [draws]."""
    if any(len(hits) == 1 for hits in networks):
        return np.zeros(_NUM_DRAWS)
    by_seed = [hits.mean(axis=1) for hits in networks]
    freedom = sum(len(top1) - 1 for top1 in by_seed)
    variance = sum(((top1 - top1.mean()) ** 2).sum() for top1 in by_seed) / freedom
    scale = np.sqrt(variance * sum(1 / len(top1) for top1 in by_seed))
    draws: npt.NDArray[np.float64] = rng.standard_t(freedom, size=_NUM_DRAWS) * scale
    return draws


def _middle(draws: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def _require_shape(hits: npt.NDArray[Any]) -> None:
    if hits.ndim != 2 or 0 in hits.shape or hits.dtype != np.bool_:
        raise PipelineError(f"found hits of shape {list(hits.shape)} and type {hits.dtype}; expected bool [seeds, clips]")
