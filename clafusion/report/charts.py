"""The figures of a report: each function draws plain values as inline SVG."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clafusion.report.html import Caption, Figure, Line, render

#: Width of a figure, for a phone held upright; in pixels.
WIDTH = 340
#: Height and width of a figure that is made of pixels.
_SIDE = 132
#: Pixels of one such figure, at most: this library writes fewer.
_LIMIT = 256 * 256
#: Red, green and blue of the pixels; their values become the opacity, so that they suit any background.
_INK = (37, 99, 235)


def neuron_map(picture: Mapping[str, Any], label: str, caption: Caption) -> Figure:
    """Draw the picture of a map, as `measurements.map_picture` packed it.

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
    return Figure(label, caption, _SIDE, _SIDE, image=f"data:image/png;base64,{data}")


def _png(height: int, width: int, levels: bytes) -> bytes:
    """Return a PNG file of one colour whose opacity is the level (PNG specification, 11.2.2 to 11.3.2.1)."""

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


def heat_map(cost: Sequence[Sequence[float]], path: Sequence[tuple[int, int]], label: str, caption: Caption) -> Figure:
    """Draw a matrix as coloured cells, the fuller the larger, with some of them framed.

    Args:
        cost: rows of finite values.
        path: (row, column) of the cells to frame.
        label: what it shows, in words.
        caption: what a page says below it.
    """
    columns = len(cost[0])
    side = max(10.0, min(38.0, (WIDTH - 30) / columns, 600 / len(cost)))
    low, high = min(map(min, cost)), max(map(max, cost))
    rows = [
        [
            {
                "value": value,
                "text": f"{value:.2f}".replace("0.", ".") if -0.995 < value < 0.995 else f"{value:.3g}",
                "share": (value - low) / ((high - low) or 1.0),
                "chosen": (i, j) in path,
            }
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(cost)
    ]
    drawing = render("heat_map.svg", rows=rows, columns=columns, side=side)
    return Figure(label, caption, 30 + columns * side, 22 + len(cost) * side, drawing)


def layer_pairs(
    deep: Sequence[Sequence[str]],
    shallow: Sequence[Sequence[str]],
    pairs: Sequence[Sequence[int]],
    names: tuple[str, str],
    lone: str,
    label: str,
    caption: Caption,
) -> Figure:
    """Draw two networks side by side, from top to bottom, with lines between the layers that correspond.

    Args:
        deep: per stage the layers of the deeper network.
        shallow: per stage those of the shallower one.
        pairs: per stage and layer of the shallower network its partner in the deeper one.
        names: of the networks.
        lone: what becomes of a layer of the deeper network without a partner.
        label: what it shows, in words.
        caption: what a page says below it.

    Raises:
        ValueError: if the layers and their partners do not fit together.
    """
    stages, top = [], 30
    for rows, others, partners in zip(deep, shallow, pairs, strict=True):
        if len(others) != len(partners) or not all(0 <= partner < len(rows) for partner in partners):
            raise ValueError(f"layers {partners} of {len(rows)} for {len(others)} others")
        stages.append({"top": top, "deep": rows, "shallow": others, "partners": partners})
        top += 24 * len(rows) + 8
    drawing = render("layers.svg", stages=stages, names=names, lone=lone, width=WIDTH)
    return Figure(label, caption, WIDTH, top, drawing)


def line_chart(
    lines: Sequence[Line], positions: Sequence[str], label: str, caption: Caption, unit: str, logarithmic: bool = False
) -> Figure:
    """Draw lines over positions.

    Args:
        lines: at least one.
        positions: names of the positions.
        label: what it shows, in words.
        caption: what a page says below it.
        unit: what is written above the vertical axis.
        logarithmic: draw the binary logarithms of the values, which are positive.
    """
    height, left, right, above, below = 200, 38, WIDTH - 8, 26, 24
    low, high, ticks = _scale([v for line in lines for v in line.values if v is not None], logarithmic)
    step = (right - left) / max(len(positions) - 1, 1)

    def y(value: float) -> float:
        shown = math.log2(max(value, 1e-12)) if logarithmic else value
        return above + (1 - min(max((shown - low) / (high - low), 0), 1)) * (height - above - below)

    points = [
        [
            None if value is None else (left + place * step, y(value), f"{line.name}, {positions[place]}: {value:.6g}")
            for place, value in enumerate(line.values)
        ]
        for line in lines
    ]
    drawing = render(
        "line_chart.svg", unit=unit, positions=positions, height=height, left=left, right=right,
        ticks=[(y(value), text, "grid one" if logarithmic and value == 1 else "grid") for value, text in ticks.items()],
        lines=list(zip((line.style for line in lines), points, strict=True)),
    )  # fmt: skip
    return Figure(label, caption, WIDTH, height, drawing, tuple(lines))


def _scale(values: Sequence[float], logarithmic: bool = False) -> tuple[float, float, dict[float, str]]:
    """Return the ends of an axis (of a logarithmic one their logarithms) and the values to write beside it."""
    if logarithmic:
        logarithms = [math.log2(value) for value in values if value > 0]
        bottom, top = math.floor(min([-1.0, *logarithms])), math.ceil(max([1.0, *logarithms]))
        every = max(1, math.ceil((top - bottom) / 6))
        powers = [k for k in range(bottom, top + 1) if k % every == 0]
        return bottom, top, {2.0**k: f"1/{2**-k}" if k < 0 else f"{2.0**k:.4g}" for k in powers}
    low, high = min(values, default=0.0), max(values, default=1.0)
    step = _step((high - low) or abs(high) or 1.0)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return first * step, last * step, {k * step: f"{k * step:.4g}" for k in range(first, last + 1)}


def _step(span: float) -> float:
    """Return a round distance of ticks, of which about five fit."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 5)


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart; all numbers are in percent.

    Attributes:
        name: of the network.
        mean: over the seeds; None without any.
        deviation: one standard deviation; None for fewer than two seeds.
        published: a number to compare with; None without any.
        values: one per seed.
        fused: whether it is stressed.
    """

    name: str
    mean: float | None
    deviation: float | None
    published: float | None
    values: tuple[float, ...]
    fused: bool

    @property
    def text(self) -> str:
        """The mean and the deviation in words."""
        if self.mean is None:
            return "–"
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")

    @property
    def spread(self) -> tuple[float, ...]:
        """The ends of the interval; empty for fewer than two seeds."""
        if self.mean is None or self.deviation is None:
            return ()
        return self.mean - self.deviation, self.mean + self.deviation


def interval_chart(rows: Sequence[Interval], label: str, caption: Caption) -> Figure:
    """Draw means with their standard deviations and the single values, one row below the other.

    Args:
        rows: from top to bottom.
        label: what it shows, in words.
        caption: what a page says below it.
    """
    numbers = [(*row.values, row.published, row.mean, *row.spread) for row in rows]
    low, high, ticks = _scale([number for row in numbers for number in row if number is not None])
    height = 22 + 36 * len(rows)

    def x(value: float) -> float:
        return 10 + (value - low) / (high - low) * (WIDTH - 24)

    drawing = render("intervals.svg", rows=rows, ticks=ticks, x=x, width=WIDTH, height=height)
    return Figure(label, caption, WIDTH, height, drawing)
