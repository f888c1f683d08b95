"""Cutting JPEG streams apart while they arrive, and finding damage."""

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.jpeg import JpegSplitter, decode_frame, require_whole_jpeg, split_jpegs


def make_jpeg(seed: int = 0, height: int = 24, width: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=80))


@given(st.lists(st.integers(0, 1000), max_size=6), st.integers(0, 40))
def test_split_jpegs_inverts_joining_and_drops_an_unfinished_end(seeds: list[int], cut: int) -> None:
    comment = b"\xff\xfe\x00\x06\xff\xd9\xff\xd8"  # an end and a beginning inside a comment segment
    jpegs = [data[:2] + comment + data[2:] for data in map(make_jpeg, seeds)]
    assert split_jpegs(b"".join(jpegs)) == jpegs
    assert split_jpegs(b"".join(jpegs) + make_jpeg()[: cut + 2]) == jpegs


def test_split_jpegs_refuses_other_bytes() -> None:
    with pytest.raises(ValueError, match="no JPEG begins at byte"):
        split_jpegs(make_jpeg() + b"junk")


@given(
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from([8, 24, 31])), max_size=5), st.lists(st.integers(1, 900), min_size=1)
)
def test_splitter_gives_the_same_files_however_the_stream_is_cut(kinds: list[tuple[int, int]], steps: list[int]) -> None:
    jpegs = [make_jpeg(seed, height) for seed, height in kinds]
    data = b"".join(jpegs)
    splitter = JpegSplitter()
    found = []
    position = 0
    for step in steps * (len(data) // sum(steps) + 1):
        found += splitter.feed(data[position : position + step])
        position += step
    assert found == jpegs
    assert splitter.sizes == {(height, 32) for _, height in kinds}


def damage_is_found(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True)
    except ValueError:
        return True
    return False


@settings(max_examples=200)
@given(st.integers(0, 20), st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_the_check_finds_what_a_full_decoding_finds(seed: int, place: int, value: int, cut: bool) -> None:
    data = bytearray(make_jpeg(seed))
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] = value
    try:
        require_whole_jpeg(bytes(data))
    except ValueError:
        return
    assert not damage_is_found(bytes(data))


def test_colours_without_rgb_and_endless_scans_are_refused() -> None:
    data = make_jpeg(height=1024, width=1024)
    with pytest.raises(ValueError, match="more than 100 scans"):
        require_whole_jpeg(data[:-2] + b"\xff\xda" * 101 + data[-2:])
    pixels = np.zeros((8, 8, 4), np.uint8)
    with pytest.raises(ValueError, match="its colours are YCCK"):
        require_whole_jpeg(bytes(simplejpeg.encode_jpeg(pixels, colorspace="CMYK", colorsubsampling="444")))


def test_a_frame_is_decoded_at_full_size_unless_half_of_it_or_less_will_do() -> None:
    data = make_jpeg(height=64, width=96)
    assert np.array_equal(decode_frame(data, 64, 96), simplejpeg.decode_jpeg(data))
    assert [decode_frame(data, 64, 96, size).shape for size in ((33, 49), (32, 48), (9, 9))] == [
        (64, 96, 3),
        (32, 48, 3),
        (16, 24, 3),
    ]
    for other, words in ((b"GIF89a", "expected a JPEG"), (make_jpeg(), "found 32 x 24 pixels")):
        with pytest.raises(ValueError, match=words):
            decode_frame(other, 64, 96)
