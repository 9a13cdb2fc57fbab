"""The figures of a report as files of their own, to be put into a paper, a README or a log."""

import re
import warnings
from collections.abc import Mapping

from clafusion.report.charts import KEY_LINE
from clafusion.report.html import PLAIN_STYLE, Safe, tag

_PICTURE = re.compile(r'<svg role="img" aria-label="([^"]*)" viewBox="0 0 (\S+) (\S+)"[^>]*>(.*?)</svg>', re.DOTALL)
_PIXELS = re.compile(r'<img src="(data:image/png;base64,[^"]*)" alt="([^"]*)"')
_KEY = '<g class="key">'
#: What to write with, first what the system calls sans-serif: that need not be installed.
_FAMILIES = (None, "DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica", "Segoe UI", "Open Sans")
#: Room around a picture, in its own units.
_MARGIN = 12
#: Height and width of a picture that is made of pixels, in units.
_SIDE = 132


def figures(page: str) -> dict[str, str]:
    """All figures of a report.

    Args:
        page: what `fusion_report` or `experiment_report` returned.

    Returns:
        By name, which does for a file, the figure as SVG: on a light ground, without a style sheet, with its legend.

    Example:
        >>> from clafusion.report.charts import heat_map
        >>> list(figures(heat_map([[0.1, 0.9], [0.8, 0.2]], [(0, 0), (1, 1)], "Layer costs: an example")))
        ['layer-costs']
    """
    found: dict[str, str] = {}
    for label, width, height, content in _PICTURE.findall(page):
        lines = content.count(_KEY) * KEY_LINE
        found[_name(label, found)] = _alone(float(width), float(height) + lines, Safe(content))
    for source, label in _PIXELS.findall(page):
        picture = tag("image", href=source, width=_SIDE, height=_SIDE, preserveAspectRatio="none",
                      style="image-rendering:pixelated")  # fmt: skip
        frame = tag("rect", width=_SIDE, height=_SIDE, fill="none", class_="grid")
        # Not by `tag` again: the label is markup already.
        found[_name(label, found)] = _alone(_SIDE, _SIDE, Safe(f"<title>{label}</title>{picture}{frame}"))
    return found


def rasterised(drawings: Mapping[str, str]) -> dict[str, bytes]:
    """Figures as PNG files, two pixels to each of their units, on white.

    Args:
        drawings: what `figures` returned.

    Returns:
        By name the content of a PNG file; nothing where there is no font to write with.

    Warns:
        UserWarning: if there is none.
    """
    from resvg_py import svg_to_bytes

    def draws(family: str | None) -> bool:
        blank = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">{}</svg>'
        letter = '<text y="9" font-family="sans-serif">x</text>'
        images = (svg_to_bytes(svg_string=blank.format(text), sans_serif_family=family) for text in (letter, ""))
        return next(images) != next(images)

    if not drawings:
        return {}
    family = next((family for family in _FAMILIES if draws(family)), "none")
    if family == "none":
        warnings.warn("Expected a font to draw PNG files with, got none; install one, such as fonts-dejavu-core",
                      UserWarning, stacklevel=2)  # fmt: skip
        return {}
    return {
        name: bytes(svg_to_bytes(svg_string=text, background="#fff", sans_serif_family=family))
        for name, text in drawings.items()
    }


def _alone(width: float, height: float, content: Safe) -> str:
    whole = width + 2 * _MARGIN, height + 2 * _MARGIN
    return tag(
        "svg", tag("style", Safe(PLAIN_STYLE)),
        tag("rect", x=-_MARGIN, y=-_MARGIN, width=whole[0], height=whole[1], rx=10, class_="ground"), content,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"{-_MARGIN} {-_MARGIN} {whole[0]:g} {whole[1]:g}",
        width=2 * whole[0], height=2 * whole[1],
    )  # fmt: skip


def _name(label: str, taken: Mapping[str, str]) -> str:
    """A name that is no path, for whatever label."""
    words = re.sub("[^a-z0-9]+", "-", label.partition(":")[0].lower()).strip("-")[:80] or "figure"
    number, name = 1, words
    while name in taken:
        number += 1
        name = f"{words}-{number}"
    return name
