"""The figures of a report as files of their own, to be put into a paper or a README."""

import base64
import re

from clafusion.report_markup import Safe, tag
from clafusion.report_page import PLAIN_STYLE

_PICTURE = re.compile(r'<svg role="img" aria-label="([^"]*)" viewBox="0 0 (\S+) (\S+)"[^>]*>(.*?)</svg>', re.DOTALL)
_PIXELS = re.compile(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)"')
#: Room around a picture, in its own units.
_MARGIN = 12


def figures(page: str) -> dict[str, bytes]:
    """All figures of a report.

    Args:
        page: what `fusion_report` or `experiment_report` returned.

    Returns:
        By the name of a file its content: SVG on a light ground that needs no style sheet, PNG for maps of neurons.

    Example:
        >>> from clafusion.report_charts import heat_map
        >>> list(figures(heat_map([[0.1, 0.9], [0.8, 0.2]], [(0, 0), (1, 1)], "Layer costs: an example")))
        ['layer-costs.svg']
    """
    found: dict[str, bytes] = {}
    for label, width, height, content in _PICTURE.findall(page):
        found[_name(label, "svg", found)] = _alone(float(width), float(height), Safe(content)).encode()
    for data, label in _PIXELS.findall(page):
        found[_name(label, "png", found)] = base64.b64decode(data)
    return found


def _alone(width: float, height: float, content: Safe) -> Safe:
    whole = width + 2 * _MARGIN, height + 2 * _MARGIN
    return tag(
        "svg", tag("style", Safe(PLAIN_STYLE)),
        tag("rect", x=-_MARGIN, y=-_MARGIN, width=whole[0], height=whole[1], rx=10, class_="ground"), content,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"{-_MARGIN} {-_MARGIN} {whole[0]:g} {whole[1]:g}",
        width=2 * whole[0], height=2 * whole[1],
    )  # fmt: skip


def _name(label: str, suffix: str, taken: dict[str, bytes]) -> str:
    """A name that is no path, for whatever label."""
    words = re.sub("[^a-z0-9]+", "-", label.partition(":")[0].lower()).strip("-")[:80] or "figure"
    number, name = 1, f"{words}.{suffix}"
    while name in taken:
        number += 1
        name = f"{words}-{number}.{suffix}"
    return name
