"""The pictures of a report, as inline SVG: each takes plain values and returns markup."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clafusion.report.html import Safe, drawing, tag, word

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


#: Pictures are drawn for a phone held upright, in pixels.
WIDTH = 340
#: Height of a line of the legend of a chart that stands alone.
KEY_LINE = 18
#: From this share of the scale on, a cell is so full that its number must be bright.
_FULL = 0.8
Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
        values: one per position; None leaves a gap.
        style: a class of the page's style sheet.
    """

    name: str
    values: Values
    style: str


def heat_map(cost: Sequence[Sequence[float]], path: Sequence[tuple[int, int]], label: str) -> Safe:
    """A matrix as coloured cells, the darker the larger, with some of them framed.

    Args:
        cost: rows of finite values.
        path: (row, column) of the cells to frame.
        label: what it shows, in words.
    """
    rows, columns = len(cost), len(cost[0])
    side = max(10.0, min(38.0, (WIDTH - 30) / columns, 600 / rows))
    low, high = min(map(min, cost)), max(map(max, cost))
    span = high - low or 1.0
    parts: list[Safe] = []
    for i, row in enumerate(cost):
        parts.append(word(20.0, 18 + (i + 0.5) * side + 4, i + 1, class_="tick end"))
        for j, value in enumerate(row):
            chosen = " chosen" if (i, j) in path else ""
            about = tag("title", f"{i + 1} – {j + 1}: {value:.6g}{', chosen' if chosen else ''}")
            x, y, depth = 26 + j * side, 18 + i * side, (value - low) / span
            cell = tag(
                "rect", x=x + 1.5, y=y + 1.5, width=side - 3, height=side - 3, rx=2, fill_opacity=0.06 + 0.84 * depth
            )
            ring = [tag("rect", x=x + 1.5, y=y + 1.5, width=side - 3, height=side - 3, rx=2, class_="ring")]
            shown = f"{value:.2f}".replace("0.", ".") if -0.995 < value < 0.995 else f"{value:.3g}"
            bright = "cell bright" if depth > _FULL else "cell"
            text = [word(x + side / 2, y + side / 2 + 4, shown, class_=bright)] if side > 30 else []
            parts.append(tag("g", about, cell, *(ring if chosen else []), *text, class_=f"heat{chosen}"))
    ticks = [word(26 + (j + 0.5) * side, 12.0, j + 1, class_="tick middle") for j in range(columns)]
    return drawing(30 + columns * side, 22 + rows * side, label, *ticks, *parts)


def alignment(
    deep: Sequence[Sequence[str]],
    shallow: Sequence[Sequence[str]],
    pairs: Sequence[Sequence[int]],
    names: tuple[str, str],
    lone: str,
    label: str,
) -> Safe:
    """Two networks side by side, from top to bottom, with lines between the layers that correspond.

    Args:
        deep: per stage the layers of the deeper network.
        shallow: per stage those of the shallower one.
        pairs: per stage and layer of the shallower network its partner in the deeper one.
        names: of the networks.
        lone: what becomes of a layer of the deeper network without a partner.
        label: what it shows, in words.
    """
    parts = [word(0.0, 14.0, names[0], class_="head"), word(float(WIDTH), 14.0, names[1], class_="head end")]
    top = 30.0
    for number, (ours, theirs, partners) in enumerate(zip(deep, shallow, pairs, strict=True)):
        height = 24.0 * len(ours)
        parts.append(tag("rect", x=0, y=top - 3, width=WIDTH, height=height + 2, rx=6, class_=f"stage s{number % 2}"))
        rows = [top + (i + 0.5) * 24.0 for i in range(len(ours))]
        for i, name in enumerate(ours):
            parts += _box(4.0, rows[i], name, None if i in partners else lone)
        # A layer stands beside its partner, so that the gaps are where layers are missing.
        for name, partner in zip(theirs, partners, strict=True):
            y, about = rows[partner], tag("title", f"{ours[partner]} ↔ {name}")
            parts.append(tag("path", about, d=f"M145 {y:g}H195", class_="link"))
            parts += _box(197.0, y, name, None)
        top += height + 8
    return drawing(WIDTH, top, label, *parts)


def _box(x: float, y: float, name: str, lone: str | None) -> list[Safe]:
    shown = name if len(name) <= 22 else f"…{name[-21:]}"
    style = "unit" if lone is None else "unit lone"
    about = name if lone is None else f"{name}: {lone}"
    box = tag("rect", x=x, y=y - 9, width=139, height=18, rx=4)
    more = [] if lone is None else [word(x + 200, y + 3.5, f"+ {lone}", class_="note")]
    return [tag("g", tag("title", about), box, word(x + 7, y + 4, shown, class_="name"), *more, class_=style)]


def line_chart(
    lines: Sequence[Line], positions: Sequence[str], label: str, unit: str, logarithmic: bool = False
) -> Safe:
    """Lines over positions, with a legend.

    Args:
        lines: at least one.
        positions: names of the positions.
        label: what it shows, in words.
        unit: what is written above the vertical axis.
        logarithmic: draw the binary logarithms of the values, which are positive.
    """
    height, left, right, above, below = 200.0, 38.0, 8.0, 26.0, 24.0
    low, high, ticks = _scale([v for line in lines for v in line.values if v is not None], logarithmic)

    def at(place: int, value: float) -> tuple[float, float]:
        shown = math.log2(max(value, 1e-12)) if logarithmic else value
        share = (shown - low) / (high - low)
        step = (WIDTH - left - right) / max(len(positions) - 1, 1)
        return left + place * step, above + (1 - min(max(share, 0), 1)) * (height - above - below)

    parts = [word(0.0, 12.0, unit, class_="tick")]
    for value in ticks:
        y = at(0, value)[1]
        one = " one" if logarithmic and value == 1 else ""
        parts.append(tag("line", x1=left, x2=WIDTH - right, y1=y, y2=y, class_=f"grid{one}"))
        parts.append(word(left - 6, y + 4, _short(value) if logarithmic else f"{value:.4g}", class_="tick end"))
    for line in lines:
        parts.append(_polyline(line, positions, at))
    parts.append(word(left, height - 6, positions[0], class_="tick"))
    if len(positions) > 1:
        parts.append(word(WIDTH - right, height - 6, positions[-1], class_="tick end"))
    return drawing(WIDTH, height, label, *parts, *_key(lines, left, height))


def _key(lines: Sequence[Line], x: float, y: float) -> list[Safe]:
    """The legend below a chart: hidden on a page, which has one for all its charts, and seen where a chart is alone."""
    return [
        tag("g", tag("path", d=f"M{x:g} {y + place * KEY_LINE + 4:g}h22", class_=f"line {line.style}"),
            word(x + 30, y + place * KEY_LINE + 8, line.name), class_="key")
        for place, line in enumerate(lines)
    ]  # fmt: skip


def legend(lines: Sequence[Line]) -> Safe:
    """The names of the lines, each with a piece of it."""
    seen = {line.name: line.style for line in lines}
    items = [
        tag("li", tag("svg", tag("path", d="M1 6H21", class_=f"line {style}"), width=22, height=12, aria_hidden="true"),
            name)
        for name, style in seen.items()
    ]  # fmt: skip
    return tag("ul", *items, class_="legend")


def _polyline(line: Line, positions: Sequence[str], at: Any) -> Safe:
    pen, steps, dots = "M", [], []
    for place, value in enumerate(line.values):
        if value is None:
            pen = "M"
            continue
        x, y = at(place, value)
        steps.append(f"{pen}{x:.1f} {y:.1f}")
        about = tag("title", f"{line.name}, {positions[place]}: {value:.6g}")
        dots.append(tag("g", about, tag("circle", cx=x, cy=y, r=2.5)))
        pen = "L"
    return tag("g", tag("path", d=" ".join(steps) or None, class_=f"line {line.style}"), *dots,
               class_=f"dots {line.style}")  # fmt: skip


def _scale(values: Sequence[float], logarithmic: bool) -> tuple[float, float, list[float]]:
    """The ends of the vertical axis (of a logarithmic one their logarithms) and the values to write beside it."""
    if logarithmic:
        found = [math.log2(value) for value in values if value > 0]
        bottom, top = math.floor(min([-1.0, *found])), math.ceil(max([1.0, *found]))
        every = max(1, math.ceil((top - bottom) / 6))
        return bottom, top, [2.0**k for k in range(bottom, top + 1) if k % every == 0]
    low, high = min(values, default=0.0), max(values, default=1.0)
    step = _step((high - low) or abs(high) or 1.0)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return first * step, last * step, [k * step for k in range(first, last + 1)]


def _step(span: float) -> float:
    """A round distance of ticks, of which about five fit."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 5)


def _short(value: float) -> str:
    """A power of two."""
    return f"1/{round(1 / value)}" if value < 1 else f"{value:.4g}"


def interval_chart(rows: Sequence[dict[str, Any]], label: str) -> Safe:
    """Means with their standard deviations and the single values, one row below the other.

    Args:
        rows: `name`; `mean`, `deviation`, `other` (a reference) in percent, or None; `values`; `style`.
        label: what it shows, in words.
    """
    known = [edge for row in rows for edge in (*row["values"], row["other"], *_ends(row)) if edge is not None]
    low, high, ticks = _scale(known, logarithmic=False)
    height = 22 + 36.0 * len(rows)

    def at(value: float) -> float:
        return 10 + (value - low) / (high - low) * (WIDTH - 24)

    parts = []
    for value in ticks:
        parts.append(tag("line", x1=at(value), x2=at(value), y1=0, y2=height - 18, class_="grid"))
        parts.append(word(at(value), height - 4, f"{value:.4g}", class_="tick middle"))
    for number, row in enumerate(rows):
        y = 36.0 * number + 26
        shown = "–" if row["mean"] is None else f"{row['mean']:.2f}"
        shown += f" ± {row['deviation']:.2f}" if row["deviation"] is not None else ""
        marks = [word(4.0, y - 10, row["name"], class_="name"), word(WIDTH - 2.0, y - 10, shown, class_="name end")]
        marks += [tag("circle", cx=at(value), cy=y, r=2.5, class_="single") for value in row["values"]]
        if row["deviation"] is not None:
            first, last = at(row["mean"] - row["deviation"]), at(row["mean"] + row["deviation"])
            marks.append(tag("line", x1=first, x2=last, y1=y, y2=y, class_="spread"))
        if row["other"] is not None:
            x = at(row["other"])
            marks.append(tag("path", tag("title", f"published: {row['other']:.2f}"), d=f"M{x:.1f} {y - 6:g}v12",
                             class_="other"))  # fmt: skip
        if row["mean"] is not None:
            marks.append(tag("circle", tag("title", f"{row['name']}: {shown}"), cx=at(row["mean"]), cy=y, r=5,
                             class_="mean"))  # fmt: skip
        parts.append(tag("g", *marks, class_=f"interval {row['style']}"))
    return drawing(WIDTH, height, label, *parts)


def _ends(row: dict[str, Any]) -> tuple[float | None, float | None]:
    if row["deviation"] is None or row["mean"] is None:
        return row["mean"], row["mean"]
    return row["mean"] - row["deviation"], row["mean"] + row["deviation"]
