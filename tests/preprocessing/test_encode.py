"""Frames written as a video and read again by the decoder of the shards."""

import numpy as np
import pytest

from infra.errors import DataError
from preprocessing import encode
from preprocessing.decode import DecodeSettings, decode_video
from preprocessing.encode import encode_mp4
from preprocessing.jpeg import decode_frame


def test_what_was_written_is_read_again(tmp_path):
    """Flat colours: what the codec does to fine detail is not the point."""
    colours = np.random.default_rng(0).integers(0, 256, (7, 2, 3, 3)).astype(np.uint8)
    frames = colours.repeat(32, axis=1).repeat(32, axis=2)
    path = tmp_path / "-odd: name.mp4"
    encode_mp4(frames, "30000/1001", path)
    video = decode_video(path, DecodeSettings())
    assert (len(video.frames), video.height, video.width, video.detail) == (7, 64, 96, "")
    assert video.fps == pytest.approx(30000 / 1001, rel=1e-3)
    for expected, jpeg in zip(frames, video.frames, strict=True):
        found = decode_frame(jpeg, 64, 96, (0, 0))
        assert np.abs(found[16::32, 16::32].astype(int) - expected[16::32, 16::32]).max() < 12
    first = path.read_bytes()
    encode_mp4(frames, "30000/1001", path)  # what stands there is replaced, by the same bytes
    assert path.read_bytes() == first


def test_an_encoder_that_fails_is_named(tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho Unknown encoder libx264 >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(encode, "ffmpeg_path", lambda: str(program))
    with pytest.raises(DataError, match=r"could not encode x.mp4: Unknown encoder libx264; expected one with libx264"):
        encode_mp4(np.zeros((1, 32, 32, 3), np.uint8), "25", tmp_path / "x.mp4")
