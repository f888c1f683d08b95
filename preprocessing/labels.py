"""What the names of labels tell: their passport, and what a horizontal flip turns each of them into."""

import re
from collections.abc import Iterable, Sequence

from infra.storage import sha256_json


def label_passport(names: Sequence[str]) -> str:
    """16 hex characters that stand for these label names in this order; carried by shards, checkpoints and runs.

    Example:
        >>> label_passport(["up", "down"]) == label_passport(["down", "up"])
        False
    """
    return sha256_json(list(names))[:16]


def mirror_labels(names: Sequence[str]) -> list[int]:
    """What a horizontal flip does to each label: the class id that the flipped video has, or -1 if it must not be flipped.

    The whole words left/right and clockwise/counterclockwise are swapped. A label without them is its own mirror image; a label
    with them whose swapped text is no label has no mirror image. On Something-V1, sorted, this gives exactly the swaps of GSM's
    code: 86-87, 93-94, 166-167. "Pulling it right out" names no direction, so right before out, away or now is not swapped.

    Example:
        >>> mirror_labels(["from left to right", "from right to left", "up", "turning left"])
        [1, 0, 2, -1]
    """
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    swapped = (_DIRECTION.sub(lambda match: _OPPOSITES[match.group()], name) for name in names)
    return [class_ids.get(name, -1) for name in swapped]


def _with_cases(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    both_ways = [pair for one, other in pairs for pair in ((one, other), (other, one))]
    return {case(word): case(opposite) for word, opposite in both_ways for case in (str.lower, str.capitalize, str.upper)}


_OPPOSITES = _with_cases([("left", "right"), ("clockwise", "counterclockwise")])
_DIRECTION = re.compile(rf"\b(?:{'|'.join(_OPPOSITES)})\b(?! (?:out|away|now)\b)")
