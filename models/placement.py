"""Which slots of the backbone carry attention: checked data where the published code edits a comment.

The published SA-GSM chooses the slots of its attention by a commented-out condition on the channel count. Here a placement is a
value that can be compared, searched over, printed and written in a config. "The optimal position of the self-attention layers
and their optimal quantity" is the future work that the paper names (section 6); there are 2^10 answers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SLOTS = ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
"""The ten Inception blocks of BN-Inception, in the order in which a frame passes them."""

_GROUPS = {
    "all": SLOTS,
    "none": (),
    **{f"stage{stage}": tuple(slot for slot in SLOTS if slot.startswith(stage)) for stage in "345"},
}
_LEGAL = f"the slots are {', '.join(SLOTS)}; also legal are {', '.join(_GROUPS)} and a bit mask from 0 to {2 ** len(SLOTS) - 1}"


@dataclass(frozen=True)
class Placement:
    """A set of slots. Equal sets are equal placements, whatever the order or spelling that they were made from.

    Args:
        slots: names from `SLOTS`, in any order; kept in the order of `SLOTS`.

    Raises:
        ValueError: if a name is no slot; the message lists the legal ones.

    Example:
        >>> placement = Placement(("4e", "3a"))
        >>> str(placement), placement.mask, "3a" in placement
        ('3a,4e', 129, True)
    """

    slots: tuple[str, ...]

    def __init__(self, slots: Iterable[str]) -> None:
        given = tuple(slots)
        for slot in given:
            if slot not in SLOTS:
                raise ValueError(f"{slot!r} is not a slot: {_LEGAL}")
        object.__setattr__(self, "slots", tuple(slot for slot in SLOTS if slot in given))

    @property
    def mask(self) -> int:
        """The placement as an integer: bit i stands for `SLOTS[i]`, so 0 is none and 1023 is all."""
        return sum(1 << SLOTS.index(slot) for slot in self.slots)

    def __contains__(self, slot: object) -> bool:
        return slot in self.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def __str__(self) -> str:
        if self.slots == SLOTS:
            return "all"
        return ",".join(self.slots) or "none"


def parse_placement(value: "str | int | Placement") -> Placement:
    """Read a placement from any of its spellings.

    Args:
        value: slots joined by `,` or `+` in any order ("3a,4e", "4e+3a"); "all", "none", "stage3", "stage4" or "stage5", alone
            or among slots; a bit mask from 0 to 1023 (bit i is `SLOTS[i]`), as an integer, as digits ("129") or in binary
            ("0b0010000001"); or a `Placement`, which is returned as it is.

    Raises:
        ValueError: if `value` is none of these; the message names what was found and lists the legal slots.

    Example:
        >>> parse_placement("4e, 3a") == parse_placement("3a+4e") == parse_placement(129) == parse_placement("0b0010000001")
        True
        >>> str(parse_placement("5a,5b,stage4"))
        '4a,4b,4c,4d,4e,5a,5b'
    """
    if isinstance(value, Placement):
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if text.startswith("0b") and set(text[2:]) <= {"0", "1"} and text != "0b":
            return _from_mask(int(text, base=2), value)
        if text.isascii() and text.isdigit():
            return _from_mask(int(text), value)
        slots: list[str] = []
        for name in text.replace("+", ",").split(","):
            slots.extend(_GROUPS.get(name.strip(), (name.strip(),)))
        return Placement(slots)
    if isinstance(value, int) and not isinstance(value, bool):
        return _from_mask(value, value)
    raise ValueError(f"a placement cannot be read from {value!r} of type {type(value).__name__}: {_LEGAL}")


def _from_mask(mask: int, written: str | int) -> Placement:
    if not 0 <= mask < 1 << len(SLOTS):
        raise ValueError(f"the bit mask {written} names slots that do not exist: {_LEGAL}")
    return Placement(slot for bit, slot in enumerate(SLOTS) if mask >> bit & 1)
