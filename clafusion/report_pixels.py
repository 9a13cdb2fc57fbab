"""The pictures of a report that are made of pixels: small PNG files inside the page."""

import base64
import struct
import zlib
from typing import Any

from clafusion.report_markup import Safe, tag

#: More pixels than this in one picture are not what this library writes.
_LIMIT = 256 * 256
#: Red, green and blue of the pictures of maps; the value becomes the opacity, so that they do on any background.
_INK = (37, 99, 235)


def pixels(picture: dict[str, Any], label: str) -> Safe:
    """The picture of a map, as `report_data.map_picture` packed it.

    Raises:
        ValueError: if it is not as long as it says.
    """
    height, width = (int(length) for length in picture["pixels"])
    if not 0 < height * width <= _LIMIT or min(height, width) < 1:
        raise ValueError(f"a picture of {height} by {width} pixels")
    unpacker = zlib.decompressobj()
    levels = unpacker.decompress(base64.b64decode(picture["image"], validate=True), height * width + 1)
    if len(levels) != height * width:
        raise ValueError(f"a picture of {len(levels)} instead of {height} by {width} pixels")
    data = base64.b64encode(_png(height, width, levels)).decode("ascii")
    return tag("img", src=f"data:image/png;base64,{data}", alt=label, title=label, width=132, height=132)


def _png(height: int, width: int, levels: bytes) -> bytes:
    """A PNG file of one colour whose opacity is the level (PNG specification, 11.2.2 to 11.3.2.1)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + levels[row * width : (row + 1) * width] for row in range(height))
    return b"".join([
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        chunk(b"PLTE", bytes(_INK) * 256),
        chunk(b"tRNS", bytes(range(256))),
        chunk(b"IDAT", zlib.compress(lines, 9)),
        chunk(b"IEND", b""),
    ])  # fmt: skip
