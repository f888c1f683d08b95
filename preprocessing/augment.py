"""Training augmentation after crop and flip: RandAugment and random erasing, the same draw for all frames of a clip.

Sources: RandAugment (Cubuk et al., 2020) with torchvision's table of operations; Random Erasing (Zhong et al., 2020), filled
with noise.

`torchvision.transforms.v2.RandAugment` and `RandomErasing` draw from torch's global generator, which all threads share. Here
the clip's own generator draws and torchvision's functions do the work; a test compares each operation with torchvision's class.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from infra.errors import ConfigError
from preprocessing.transforms import Frame

MAX_MAGNITUDE = 30
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)
_ERASE_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What else training does to a clip; nothing by default.

    Attributes:
        num_ops: operations of RandAugment in a row, 0 for none.
        magnitude: their strength, 0 to 30.
        erase_probability: chance that a rectangle of the clip, the same in all frames, is filled with noise.

    Raises:
        ConfigError: if a value is out of range.
    """

    num_ops: int = 0
    magnitude: int = 9
    erase_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.num_ops < 0:
            raise ConfigError(f"num_ops of RandAugment is {self.num_ops}; expected at least 0")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ConfigError(f"magnitude of RandAugment is {self.magnitude}; expected 0 to {MAX_MAGNITUDE}")
        if not 0 <= self.erase_probability <= 1:
            raise ConfigError(f"erase_probability is {self.erase_probability}; expected 0 to 1")


NO_AUGMENTATION = Augmentation()


def augment_clip(clip_THWC: Frame, augmentation: Augmentation, rng: np.random.Generator) -> None:
    """Change a clip in place.

    Args:
        clip_THWC: uint8 pixels. Shape: [T, H, W, 3].
        augmentation: what to do.
        rng: the clip's own; how much is drawn from it depends on `augmentation` and on the draws.
    """
    clip_TCHW = torch.from_numpy(clip_THWC).permute(0, 3, 1, 2)
    if augmentation.num_ops:
        changed_TCHW = clip_TCHW
        for _ in range(augmentation.num_ops):
            operation = _OPERATIONS[_NAMES[rng.integers(len(_NAMES))]]
            sign = -1 if operation.is_signed and rng.random() < 0.5 else 1
            changed_TCHW = operation.apply(changed_TCHW, sign * operation.strength(augmentation.magnitude))
        clip_TCHW.copy_(changed_TCHW)
    if augmentation.erase_probability and rng.random() < augmentation.erase_probability:
        _erase(clip_TCHW, rng)


def _erase(clip_TCHW: torch.Tensor, rng: np.random.Generator) -> None:
    """Fill a rectangle with noise; nothing if ten attempts find none that fits."""
    height, width = clip_TCHW.shape[-2:]
    for _ in range(_ERASE_ATTEMPTS):
        area = height * width * rng.uniform(*_ERASED_AREA)
        ratio = math.exp(rng.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
        erased_height, erased_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < erased_height < height and 0 < erased_width < width:
            top = int(rng.integers(height - erased_height + 1))
            left = int(rng.integers(width - erased_width + 1))
            noise = torch.from_numpy(rng.integers(0, 256, (3, erased_height, erased_width), dtype=np.uint8))
            functional.erase(clip_TCHW, top, left, erased_height, erased_width, noise, inplace=True)
            return


@dataclass(frozen=True, slots=True)
class _Operation:
    """An operation of RandAugment: `apply(clip, x)`, where |x| goes with the magnitude from `weakest` to `strongest`."""

    apply: Callable[[torch.Tensor, float], torch.Tensor]
    weakest: float = 0.0
    strongest: float = 0.0
    is_signed: bool = False

    def strength(self, magnitude: int) -> float:
        """In float32, as torchvision has it: thresholds and rounding then fall the same way."""
        return float(torch.linspace(self.weakest, self.strongest, MAX_MAGNITUDE + 1)[magnitude])


def _shear(clip: torch.Tensor, x: float, y: float) -> torch.Tensor:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return functional.affine(clip, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])  # type: ignore[no-any-return]


def _translate(clip: torch.Tensor, x: float, y: float) -> torch.Tensor:
    pixels = [int(x * clip.shape[-1]), int(y * clip.shape[-2])]
    return functional.affine(clip, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])  # type: ignore[no-any-return]


_OPERATIONS = {
    "Identity": _Operation(lambda clip, _: clip),
    "ShearX": _Operation(lambda clip, x: _shear(clip, x, 0.0), 0.0, 0.3, is_signed=True),
    "ShearY": _Operation(lambda clip, x: _shear(clip, 0.0, x), 0.0, 0.3, is_signed=True),
    "TranslateX": _Operation(lambda clip, x: _translate(clip, x, 0.0), 0.0, 150 / 331, is_signed=True),
    "TranslateY": _Operation(lambda clip, x: _translate(clip, 0.0, x), 0.0, 150 / 331, is_signed=True),
    "Rotate": _Operation(functional.rotate, 0.0, 30.0, is_signed=True),
    "Brightness": _Operation(lambda clip, x: functional.adjust_brightness(clip, 1 + x), 0.0, 0.9, is_signed=True),
    "Color": _Operation(lambda clip, x: functional.adjust_saturation(clip, 1 + x), 0.0, 0.9, is_signed=True),
    "Contrast": _Operation(lambda clip, x: functional.adjust_contrast(clip, 1 + x), 0.0, 0.9, is_signed=True),
    "Sharpness": _Operation(lambda clip, x: functional.adjust_sharpness(clip, 1 + x), 0.0, 0.9, is_signed=True),
    "Posterize": _Operation(lambda clip, x: functional.posterize(clip, round(x)), 8.0, 4.0),
    "Solarize": _Operation(lambda clip, x: functional.solarize(clip, 255 * x), 1.0, 0.0),
    "AutoContrast": _Operation(lambda clip, _: functional.autocontrast(clip)),
    "Equalize": _Operation(lambda clip, _: functional.equalize(clip)),
}
_NAMES = tuple(_OPERATIONS)
