"""Films of where attention looks: the frames of a clip as the network saw them, and beside them the same under the attention of
each slot; several clips stand side by side.

Drawn is |gamma| times the attention that a place gets (`models.AttentionMap.weight`), on one scale for all films, so that
slots, frames, clips and networks can be compared: nothing is made brighter because there is nothing brighter, and an attention
whose gamma is 0 covers nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from infra.errors import ConfigError
from infra.storage import atomic_path
from pipelines.evaluation.figures import plain_name
from pipelines.evaluation.overlay import enlarge, legend, overlay
from preprocessing.encode import encode_mp4

if TYPE_CHECKING:
    from models.insight import AttentionMap

SUFFIXES = (".mp4", ".gif")
SHOWN_PIXELS = 224
"""Side of the frames that a film is made of; more than networks see of small clips, so that people see something."""

_FRAMES_PER_SECOND = 2
_HALF_HEAT = 0.25
"""The weight that is drawn as half of the greatest heat. Weights have no upper bound, so the scale bends: w / (w + 0.25)."""
_TICKS = (0.0, 0.1, 0.25, 1.0)
_WIDE_BLOCK, _NARROW_BLOCK = 720, 480
_MOST_COLUMNS = 4
_MOST_SLOTS = 11
"""With the clip itself three rows; all of BN-Inception's and ResNet-18's fit."""
_MARGIN, _GAP = 12, 8
_HEAD, _CAPTION, _FOOT = 72, 32, 60
_LEGEND_WIDTH = 240
_INK, _SOFT, _GREEN, _RED = "#24292f", "#5b6570", "#1a7f37", "#b3261e"


@dataclass(frozen=True)
class SlotFilm:
    """The attention of one slot on one clip.

    Attributes:
        name: of the slot.
        gamma: its strength.
        weight: |gamma| times the attention that each place gets, 1 where even attention is and gamma is 1. Shape: [T, h, w].
    """

    name: str
    gamma: float
    weight: npt.NDArray[np.float32]


@dataclass(frozen=True)
class FilmClip:
    """One clip of a film.

    Attributes:
        title: names the video.
        frames: what the network saw, at any size. Shape: [T, H, W, 3].
        answer: the most probable class.
        probability: of the answer, in [0, 1].
        label: the true class; None if nobody knows.
        slots: in the order in which a frame passes them.
    """

    title: str
    frames: npt.NDArray[np.uint8]
    answer: str
    probability: float
    label: str | None
    slots: Sequence[SlotFilm]


def slot_films(maps: "Sequence[AttentionMap]", clip: int = 0) -> list[SlotFilm]:
    """The attention of one clip of a batch, as `models.attention_maps` found it."""
    return [SlotFilm(found.name, found.gamma, found.weight[clip].float().cpu().numpy()) for found in maps]


def require_film_name(path: Path) -> None:
    """Refuse a file name that says of no kind of film that can be written.

    Raises:
        ConfigError: naming the kinds.
    """
    if path.suffix.lower() not in SUFFIXES:
        found = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise ConfigError(f"{path} has {found}; a film is written as {' or '.join(SUFFIXES)}")


def save_film(path: Path, clips: Sequence[FilmClip]) -> Path:
    """Draw a film and write it, whole or not at all: H.264 for ".mp4", an endless loop for ".gif", two frames a second.

    The same clips give the same bytes (of H.264, with the same ffmpeg).

    Raises:
        ConfigError: for another suffix.
        DataError, PipelineError: as `encode_mp4`.
    """
    require_film_name(path)
    frames = draw_film(clips)
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".mp4":
            encode_mp4(frames, str(_FRAMES_PER_SECOND), temporary)
        else:
            first, *rest = (Image.fromarray(frame) for frame in frames)
            duration = 1000 // _FRAMES_PER_SECOND
            first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return path


def draw_film(clips: Sequence[FilmClip]) -> npt.NDArray[np.uint8]:
    """The frames of a film: uint8 RGB [T, height, width, 3], height and width even.

    Of more than 11 slots the strongest are shown.

    Args:
        clips: at least one, all of T frames and with attention in the same slots.
    """
    strengths = sorted((-abs(slot.gamma), place) for place, slot in enumerate(clips[0].slots))
    places = sorted(place for _, place in strengths[:_MOST_SLOTS])
    block_width = _WIDE_BLOCK if len(clips) == 1 else _NARROW_BLOCK
    blocks = [_draw_block(clip, [clip.slots[place] for place in places], block_width) for clip in clips]
    num_frames, height = blocks[0].shape[0], max(block.shape[1] for block in blocks)
    film = np.full((num_frames, height + _FOOT, block_width * len(clips), 3), 255, np.uint8)
    for place, block in enumerate(blocks):
        film[:, : block.shape[1], place * block_width : (place + 1) * block_width] = block
    foot = _draw_foot(clips, film.shape[2])
    for index, frame in enumerate(film):
        frame[height:] = foot
        _write_segment(frame[height:], index, num_frames)
    return film


def weight_heat(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The heat, in [0, 1), that a weight is drawn with; 0 is 0, and 0.25 is half."""
    return weight / (weight + np.float32(_HALF_HEAT))


def _draw_block(clip: FilmClip, slots: Sequence[SlotFilm], width: int) -> npt.NDArray[np.uint8]:
    """One clip in all frames: the answer, the clip, and the clip under the attention of slots. Shape: [T, height, width, 3]."""
    panels = [("the clip", "", clip.frames)]
    for slot in slots:
        heat = enlarge(weight_heat(slot.weight), *clip.frames.shape[:3])
        panels.append((slot.name, f"gamma {slot.gamma:+.3g}", overlay(clip.frames, heat)))
    columns = min(len(panels), _MOST_COLUMNS)
    side = (width - 2 * _MARGIN - _GAP * (columns - 1)) // columns
    height = _HEAD + -(-len(panels) // columns) * (_CAPTION + side + _GAP)
    page = Image.new("RGB", (width, height + height % 2), "white")
    draw = ImageDraw.Draw(page)
    _write_head(draw, clip)
    places = [
        (_MARGIN + column * (side + _GAP), _HEAD + row * (_CAPTION + side + _GAP))
        for row, column in (divmod(number, columns) for number in range(len(panels)))
    ]
    for (left, top), (name, number, _) in zip(places, panels, strict=True):
        draw.text((left, top), plain_name(name), fill=_INK, font=_font(12))
        draw.text((left, top + 14), number, fill=_SOFT, font=_font(12))
    block = np.repeat(np.asarray(page)[np.newaxis], len(clip.frames), axis=0)
    for (left, top), (_, _, frames) in zip(places, panels, strict=True):
        rows = slice(top + _CAPTION, top + _CAPTION + side)
        for picture, frame in zip(block, frames, strict=True):
            picture[rows, left : left + side] = Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)
    return block


def _write_head(draw: ImageDraw.ImageDraw, clip: FilmClip) -> None:
    if clip.label is None:
        colour, second = _INK, "true class not known"
    elif clip.label == clip.answer:
        colour, second = _GREEN, "right"
    else:
        colour, second = _RED, f"wrong: it is {plain_name(clip.label, 48)}"
    answer = f"{plain_name(clip.answer, 40)}  {100 * clip.probability:.1f} %"
    draw.text((_MARGIN, 8), answer, fill=colour, font=_font(17))
    draw.text((_MARGIN, 31), second, fill=colour, font=_font(13))
    draw.text((_MARGIN, 49), plain_name(clip.title, 60), fill=_SOFT, font=_font(12))


def _draw_foot(clips: Sequence[FilmClip], width: int) -> npt.NDArray[np.uint8]:
    """What the colours mean. Shape: [_FOOT, width, 3]."""
    page = Image.new("RGB", (width, _FOOT), "white")
    draw = ImageDraw.Draw(page)
    page.paste(Image.fromarray(legend(14, _LEGEND_WIDTH)), (_MARGIN, 4))
    for weight, heat in zip(_TICKS, weight_heat(np.array(_TICKS, np.float32)), strict=True):
        left = _MARGIN + float(heat) * _LEGEND_WIDTH
        draw.line([(left, 18), (left, 21)], fill=_INK)
        draw.text((left, 22), f"{weight:g}", fill=_INK, font=_font(11), anchor="ma" if weight else "la")
    meaning = "|gamma| x attention that a place gets; 1 is even attention at gamma 1"
    if all(slot.gamma == 0 for clip in clips for slot in clip.slots):
        meaning = "every gamma is 0: attention adds nothing, so nothing is covered"
    if len(clips[0].slots) > _MOST_SLOTS:
        meaning += f"; the strongest {_MOST_SLOTS} of {len(clips[0].slots)}"
    draw.text((_MARGIN, 40), meaning, fill=_SOFT, font=_font(12))
    return np.asarray(page)


def _write_segment(foot: npt.NDArray[np.uint8], index: int, num_frames: int) -> None:
    """Which frame of the clip this is, at the right of the foot."""
    page = Image.fromarray(foot)
    text = f"segment {index + 1} of {num_frames}"
    ImageDraw.Draw(page).text((foot.shape[1] - _MARGIN, 4), text, fill=_INK, font=_font(12), anchor="ra")
    foot[:] = np.asarray(page)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
