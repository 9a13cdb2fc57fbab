"""The figures of a report as files of their own, to be put into a paper, a README or a log."""

import re
import warnings
from collections.abc import Iterable, Mapping

from markupsafe import Markup

from clafusion.report.html import Figure, render

#: Fonts to try, after the one that the system calls sans-serif (None), which need not be installed.
_FAMILIES = (None, "DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica", "Segoe UI", "Open Sans")
#: Width of the margin around a figure, in its own units.
_MARGIN = 12


def svg_files(figures: Iterable[Figure]) -> dict[str, str]:
    """Return figures as SVG files: on a light ground, with their legends, without style sheets.

    Args:
        figures: of one report.

    Returns:
        By a name that suits a file, its content.

    Example:
        >>> from clafusion.report.charts import heat_map
        >>> list(svg_files([heat_map([[0.1, 0.9], [0.8, 0.2]], [(0, 0), (1, 1)], "Layer costs: an example", ())]))
        ['layer-costs']
    """
    files: dict[str, str] = {}
    style = _plain_style()
    for figure in figures:
        if figure.drawing or figure.image:
            content = render("figure_file.svg", figure=figure, margin=_MARGIN, style=style)
            files[_name(figure, files)] = str(content)
    return files


def rasterised(files: Mapping[str, str]) -> dict[str, bytes]:
    """Return figures as PNG files, two pixels to each of their units, on white.

    Args:
        files: what `svg_files` returned.

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

    if not files:
        return {}
    family = next((family for family in _FAMILIES if draws(family)), "none")
    if family == "none":
        warnings.warn("Expected a font to draw PNG files with, got none; install one, such as fonts-dejavu-core",
                      UserWarning, stacklevel=2)  # fmt: skip
        return {}
    return {
        name: bytes(svg_to_bytes(svg_string=text, background="#fff", sans_serif_family=family))
        for name, text in files.items()
    }


def _plain_style() -> Markup:
    """Return the style sheet of the figures with its light colours in place of variables, which few programs know."""
    css = render("figures.css")
    colours = dict(re.findall(r"(--\w+): (#\w+)", css))
    rules = re.sub(r":root \{[^}]*\}\n", "", css)
    return Markup(re.sub(r"var\((--\w+)\)", lambda name: colours[name[1]], rules) + ".ground { fill: #fff }")


def _name(figure: Figure, taken: Mapping[str, str]) -> str:
    """Return a name that is no path, whatever the label, and that no other figure has."""
    words = re.sub("[^a-z0-9]+", "-", figure.label.partition(":")[0].lower()).strip("-")[:80] or "figure"
    first = name = f"{figure.prefix}{words}"
    number = 1
    while name in taken:
        number += 1
        name = f"{first}-{number}"
    return name
