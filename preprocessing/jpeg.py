"""JPEG files as bytes: cutting a stream of them apart, checking that one decodes in full, and decoding it."""

import numpy as np
import numpy.typing as npt
import simplejpeg

MAX_PIXELS = 1 << 26
# Progressive files may repeat scans for ever, each of which costs a pass over all pixels; encoders write about ten. A scan
# takes at least ten bytes (ITU-T T.81, B.2.3), so that a small file cannot make much work, and its scans need not be counted.
_MAX_SCANS = 100
_MIN_SCAN_BYTES = 10
_MAX_PIXELS_SCANNED = 1 << 30
_START = b"\xff\xd8"
_SCAN = b"\xff\xda"
_END = b"\xff\xd9"
# Frames of Something-V1 a second on one thread, medians over 9 interleaved rounds on a busy machine (2026-11): simplejpeg 1.9.0
# 3,290, PyTurboJPEG 1.8 with Debian's libturbojpeg 2.1 2,797, torchvision.io 2,680, Pillow 1,726. PyTurboJPEG finds no
# library of its own on PyPI, and its version 2 wants libturbojpeg 3, which Debian 12 lacks.
# At half size or less libjpeg saves time (256 x 340 to 128 x 170: half of it); between half and full size it is slower.
_MIN_REDUCTION = 2.0
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_COLOURS = {"YCbCr", "Gray", "RGB"}


class JpegSplitter:
    """Cuts a stream of joined baseline JPEG files apart while it arrives, as ffmpeg's mjpeg encoder writes them.

    Segments before the scan are skipped by their length, so bytes inside them are never taken for an end; inside the scan a
    0xFF is always followed by 0x00 or a restart marker (ITU-T T.81, B.1.1.5), so the first FF D9 is the end. Only the bytes of
    the unfinished file are held.

    Attributes:
        sizes: (height, width) in pixels of the files seen so far.
    """

    def __init__(self) -> None:
        self.sizes: set[tuple[int, int]] = set()
        self._rest = bytearray()
        self._search_from = 0  # where the end marker may begin at the earliest; 0 as long as the header is not complete
        self._header = b"\0"  # of the file before; nearly always that of the next one too, then nothing is parsed

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take the next bytes of the stream; returns the files that they complete, in order.

        Raises:
            ValueError: if the stream does not consist of such files.
        """
        rest = self._rest
        rest += chunk
        jpegs = []
        start = 0
        while start < len(rest):
            if not self._search_from:
                self._search_from = self._scan_start(start)
            if not self._search_from:
                break
            end = rest.find(_END, self._search_from)
            if end < 0:
                self._search_from = max(self._search_from, len(rest) - 1)
                break
            jpegs.append(bytes(memoryview(rest)[start : end + 2]))
            start = end + 2
            self._search_from = 0
        del rest[:start]
        self._search_from = max(0, self._search_from - start)
        return jpegs

    def _scan_start(self, start: int) -> int:
        """Where the entropy-coded data of the file at `start` begins; 0 if that has not arrived yet."""
        rest = self._rest
        if rest.startswith(self._header, start):
            return start + len(self._header)
        if not _START.startswith(rest[start : start + 2]):
            raise ValueError(f"no JPEG begins at byte {start} of the stream")
        position = start + 2
        size = None
        while position + 4 <= len(rest):
            if rest[position] != 0xFF:
                raise ValueError(f"no JPEG segment begins at byte {position} of the stream")
            end = position + 2 + int.from_bytes(rest[position + 2 : position + 4], "big")
            if end > len(rest):
                return 0
            if rest[position + 1] in _FRAME_HEADERS and end - position >= 9:
                size = (
                    int.from_bytes(rest[position + 5 : position + 7], "big"),
                    int.from_bytes(rest[position + 7 : position + 9], "big"),
                )
            if rest[position : position + 2] == _SCAN:
                if size is None:
                    raise ValueError(f"the JPEG at byte {start} of the stream has no frame header")
                self.sizes.add(size)
                self._header = bytes(rest[start:end])
                return end
            position = end
        return 0


def split_jpegs(data: bytes) -> list[bytes]:
    """Split joined baseline JPEG files; an unfinished last one is dropped. See `JpegSplitter`.

    Raises:
        ValueError: if `data` is not such a stream.
    """
    return JpegSplitter().feed(data)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header.

    Raises:
        ValueError: if the header is no JPEG's.
    """
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return int(height), int(width)


class OversizeError(ValueError):
    """A picture has more than `MAX_PIXELS`."""


def require_whole_jpeg(data: bytes) -> tuple[int, int]:
    """Decode all of a JPEG file, at an eighth of its size, which costs little and finds the same damage.

    Returns:
        Height and width in pixels.

    Raises:
        OversizeError: before anything is decoded.
        ValueError: if it is cut, damaged, of a colour model that has no RGB, or has so many scans that it would take seconds.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise OversizeError(f"has {width}x{height} pixels; expected at most {MAX_PIXELS}")
    if colours not in _COLOURS:
        raise ValueError(f"its colours are {colours}; expected {', '.join(sorted(_COLOURS))}")
    if height * width * (len(data) // _MIN_SCAN_BYTES) > _MAX_PIXELS_SCANNED and data.count(_SCAN) > _MAX_SCANS:
        raise ValueError(f"more than {_MAX_SCANS} scans")
    simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=1)
    return height, width


def decode_frame(data: bytes, height: int, width: int, smallest_size: tuple[int, int] = (0, 0)) -> npt.NDArray[np.uint8]:
    """Decode a frame to RGB pixels. Shape: [H, W, 3].

    Args:
        data: a JPEG file.
        height: that it must have, in pixels.
        width: that it must have.
        smallest_size: (height, width) that would do. If half the frame's size or less will do, the frame is decoded at n/8 of
            its size, which is twice as fast and gives slightly other pixels than decoding and resizing. (0, 0) decodes at full
            size.

    Raises:
        ValueError: if it is no whole JPEG or has another size.
    """
    if not data.startswith(_START):
        raise ValueError(f"found bytes that begin with {data[:4]!r}, expected a JPEG")
    found_height, found_width = jpeg_size(data)
    if (found_height, found_width) != (height, width):
        raise ValueError(f"found {found_width} x {found_height} pixels, the index says {width} x {height}")
    min_height, min_width = smallest_size if any(smallest_size) else (height, width)
    return simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width, min_factor=_MIN_REDUCTION)  # type: ignore[no-any-return]
