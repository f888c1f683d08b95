"""Which slots of the backbone carry attention: checked data where the published code edits a comment.

The published SA-GSM chooses the slots of its attention by a commented-out condition on the channel count. Here a placement is a
value that can be compared, searched over, printed and written in a config. "The optimal position of the self-attention layers
and their optimal quantity" is the future work that the paper names (section 6); there are 2^10 answers on BN-Inception.

Each backbone has its own slots, in the order in which a frame passes them (`models.model_slots`); a placement knows which slots
it was chosen from.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

SLOTS = ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
"""The ten Inception blocks of BN-Inception, in the order in which a frame passes them; the slots where none are named."""


@dataclass(frozen=True)
class Placement:
    """A set of slots. Equal sets of one backbone are equal placements, whatever the order or spelling that they were made from.

    Args:
        slots: names from `among`, in any order; kept in the order of `among`.
        among: the slots of the backbone; those of BN-Inception by default.

    Raises:
        ValueError: if a name is no slot; the message lists the legal ones.

    Example:
        >>> placement = Placement(("4e", "3a"))
        >>> str(placement), placement.mask, "3a" in placement
        ('3a,4e', 129, True)
    """

    slots: tuple[str, ...]
    among: tuple[str, ...] = field(repr=False)

    def __init__(self, slots: Iterable[str], among: Sequence[str] = SLOTS) -> None:
        given = tuple(slots)
        for slot in given:
            if slot not in among:
                raise ValueError(f"{slot!r} is not a slot: {_legal(among)}")
        object.__setattr__(self, "slots", tuple(slot for slot in among if slot in given))
        object.__setattr__(self, "among", tuple(among))

    @property
    def mask(self) -> int:
        """The placement as an integer: bit i stands for slot i of the backbone, so 0 is none and, of ten slots, 1023 is all."""
        return sum(1 << self.among.index(slot) for slot in self.slots)

    def __contains__(self, slot: object) -> bool:
        return slot in self.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def __str__(self) -> str:
        if self.slots == self.among:
            return "all"
        return ",".join(self.slots) or "none"


def parse_placement(value: "str | int | Placement", slots: Sequence[str] = SLOTS) -> Placement:
    """Read a placement from any of its spellings.

    Args:
        value: slots joined by `,` or `+` in any order ("3a,4e", "4e+3a"); "all", "none", or the slots whose map is 1 / 2^n of
            the frame ("stage3", "stage4" or "stage5"; on a ResNet also "stage2"), alone or among slots; a bit mask (bit i is
            slot i; from 0 to 1023 where there are ten), as an integer, as digits ("129") or in binary ("0b0010000001"); or a
            `Placement` of these slots, which is returned as it is.
        slots: the slots of the backbone (`models.model_slots`); those of BN-Inception by default.

    Raises:
        ValueError: if `value` is none of these; the message names what was found and lists the legal slots.

    Example:
        >>> parse_placement("4e, 3a") == parse_placement("3a+4e") == parse_placement(129) == parse_placement("0b0010000001")
        True
        >>> str(parse_placement("5a,5b,stage4"))
        '4a,4b,4c,4d,4e,5a,5b'
        >>> str(parse_placement("stage2", slots=("layer1.0", "layer1.1", "layer2.0")))
        'layer1.0,layer1.1'
    """
    if isinstance(value, Placement):
        if value.among != tuple(slots):
            raise ValueError(f"the placement {value} was made for a backbone of other slots: {_legal(slots)}")
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if text.startswith("0b") and set(text[2:]) <= {"0", "1"} and text != "0b":
            return _from_mask(int(text, base=2), value, slots)
        if text.isascii() and text.isdigit():
            return _from_mask(int(text), value, slots)
        groups = _groups(slots)
        names: list[str] = []
        for name in text.replace("+", ",").split(","):
            names.extend(groups.get(name.strip(), (name.strip(),)))
        return Placement(names, slots)
    if isinstance(value, int) and not isinstance(value, bool):
        return _from_mask(value, value, slots)
    raise ValueError(f"a placement cannot be read from {value!r} of type {type(value).__name__}: {_legal(slots)}")


def _from_mask(mask: int, written: str | int, slots: Sequence[str]) -> Placement:
    if not 0 <= mask < 1 << len(slots):
        raise ValueError(f"the bit mask {written} names slots that do not exist: {_legal(slots)}")
    return Placement((slot for bit, slot in enumerate(slots) if mask >> bit & 1), slots)


def _groups(slots: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names for several slots at once."""
    groups: dict[str, tuple[str, ...]] = {"all": tuple(slots), "none": ()}
    for slot in slots:
        stage = f"stage{_stage(slot)}"
        groups[stage] = (*groups.get(stage, ()), slot)
    return groups


def _stage(slot: str) -> int:
    """The n of a slot whose map is 1 / 2^n of the frame: 3 for "3a", "layer2.0" and "mixed" to "mixed_3", for example."""
    if slot.startswith("layer"):
        return int(slot[len("layer")]) + 1
    if slot.startswith("mixed"):
        number = int(slot.removeprefix("mixed").removeprefix("_") or 0)
        return 3 if number <= 3 else 4 if number <= 8 else 5
    return int(slot[0])


def _legal(slots: Sequence[str]) -> str:
    names, most = ", ".join(slots), 2 ** len(slots) - 1
    return f"the slots are {names}; also legal are {', '.join(_groups(slots))} and a bit mask from 0 to {most}"
