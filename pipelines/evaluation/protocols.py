"""Protocols by name: which views of a video a network is shown, whose scores are averaged.

centre                   the centre clip, the centre crop
2clips                   two clips, the centre crop of each
3crops, 5crops, 10crops  of the centre clip, as `preprocessing.views` lays them
full                     of the centre clip the whole frame, scaled as for the centre crop (short side 256 for 224 pixels)
CxV                      C clips by V crops, such as 10x3
seed_code                what the published SA-GSM code validates with: a random clip, a training crop, mirrored or not whatever
                         the label says, without mean and deviation; drawn by seed and video, so that it is the same each time
"""

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from infra.errors import ConfigError
from preprocessing.labels import mirror_labels

if TYPE_CHECKING:
    from preprocessing.views import NumClips, NumCrops

# As `preprocessing.views`, which would import torch: every command reads the settings.
NUM_CLIPS: "tuple[NumClips, ...]" = (1, 2, 10)
NUM_CROPS: "tuple[NumCrops, ...]" = (1, 3, 5, 10)
_MIRRORING = 10


@dataclass(frozen=True)
class Protocol:
    """A way of showing a video.

    Attributes:
        name: the one way to write it.
        num_clips: of a video.
        num_crops: of a clip.
        whole_frames: nothing is cropped.
        seed_code: random views of training, without normalisation.
    """

    name: str
    num_clips: "NumClips" = 1
    num_crops: "NumCrops" = 1
    whole_frames: bool = False
    seed_code: bool = False

    def require_fits(self, label_names: list[str]) -> None:
        """Refuse mirror images where they have other labels.

        Raises:
            ConfigError: if crops are mirrored and a label names a direction.
        """
        turned = [label_names[label] for label, twin in enumerate(mirror_labels(label_names)) if twin != label]
        if self.num_crops == _MIRRORING and turned:
            raise ConfigError(
                f"evaluate.protocol={self.name} also shows mirror images, and that of {turned[0]!r} has another label; choose "
                "one with fewer crops, such as 5crops"
            )

    def describe(self) -> str:
        """What was shown, in one sentence for a page."""
        if self.seed_code:
            return (
                "One random view a clip, without mean and deviation, as the published code validates: lower than what the "
                "network can do, and not to be compared with other protocols."
            )
        if self.whole_frames:
            return "One view a clip: the whole frames. Published numbers are mostly of the centre crop."
        if self.num_clips * self.num_crops == 1:
            return "One view a clip: the centre frames and the centre crop. Published numbers often average several."
        return (
            f"The mean over {self.num_clips * self.num_crops} views of a video ({self.num_clips} in time, {self.num_crops} in "
            "space): not to be compared with numbers of one view."
        )


_NAMED = (
    Protocol("centre"),
    Protocol("2clips", num_clips=2),
    Protocol("3crops", num_crops=3),
    Protocol("5crops", num_crops=5),
    Protocol("10crops", num_crops=10),
    Protocol("full", whole_frames=True),
    Protocol("seed_code", seed_code=True),
)


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; what has a shorter name gets it (1x3 is 3crops).

    Raises:
        ConfigError: if there is none; the known ones are named.

    Example:
        >>> find_protocol("2x1").name, find_protocol("10x3").num_crops
        ('2clips', 3)
    """
    known = {f"{clips}x{crops}": Protocol(f"{clips}x{crops}", clips, crops) for clips, crops in product(NUM_CLIPS, NUM_CROPS)}
    known |= {f"{named.num_clips}x{named.num_crops}": named for named in _NAMED if not (named.whole_frames or named.seed_code)}
    known |= {named.name: named for named in _NAMED}
    if name not in known:
        raise ConfigError(
            f"found protocol {name!r}; expected one of {', '.join(named.name for named in _NAMED)}, or clips x crops such as "
            f"10x3, with {_or(NUM_CLIPS)} clips and {_or(NUM_CROPS)} crops"
        )
    return known[name]


def _or(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
