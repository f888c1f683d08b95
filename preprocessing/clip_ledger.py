"""A hash of the clips that an epoch has shown: equal for equal multisets, whatever their order, ranks or interruptions.

The sum of the keys' hashes modulo 2**128. Sums of ranks add up, and a resumed epoch goes on from its own; a clip that is lost
or doubled changes the sum. It guards against mistakes, not against an enemy who chooses keys.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

_MODULUS = 1 << 128


@dataclass(frozen=True, slots=True)
class ClipLedger:
    """Which clips were shown, as a number of clips and a sum of hashes.

    Attributes:
        num_clips: how many, each as often as it was shown.
        total: sum of the hashes of their keys, below 2**128.

    Example:
        >>> ClipLedger().add(["a", "b"]) == ClipLedger().add(["b"]) + ClipLedger().add(["a"])
        True
        >>> ClipLedger().add(["a", "a"]) == ClipLedger().add(["a", "b"])
        False
    """

    num_clips: int = 0
    total: int = 0

    def add(self, keys: Iterable[str]) -> "ClipLedger":
        """The ledger with one more clip for each key."""
        hashes = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()) for key in keys]
        return ClipLedger(self.num_clips + len(hashes), (self.total + sum(hashes)) % _MODULUS)

    def __add__(self, other: "ClipLedger") -> "ClipLedger":
        return ClipLedger(self.num_clips + other.num_clips, (self.total + other.total) % _MODULUS)

    def __str__(self) -> str:
        """As it is stored and shown: `640:` and 32 hex digits."""
        return f"{self.num_clips}:{self.total:032x}"

    @staticmethod
    def parse(text: str) -> "ClipLedger":
        """The ledger that printed itself so.

        Raises:
            ValueError: if `text` is no such thing.
        """
        num_clips, total = text.split(":")
        return ClipLedger(int(num_clips), int(total, 16))
