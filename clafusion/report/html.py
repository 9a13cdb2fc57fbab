"""HTML and SVG from Jinja2 templates, which escape every value that is not markup already."""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

#: Characters that XML 1.0 does not allow in a text.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: The text below a figure; where it has several parts, the first is its title.
Caption = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
        values: one per position; None leaves a gap.
        style: its classes in the style sheet.
    """

    name: str
    values: tuple[float | None, ...]
    style: str


@dataclass(frozen=True)
class Figure:
    """A picture with its caption: shown on a page, and written as a file of its own.

    Attributes:
        label: what it shows, in words; the part before a colon names its file.
        caption: what a page says below it.
        width: in units of the drawing; on a page these are pixels where there is room for them.
        height: likewise.
        drawing: the elements of an SVG picture.
        lines: what a legend explains: one for all charts of a section on a page, its own in a file.
        image: instead of a drawing, the URL of a PNG picture with its data.
        prefix: what the name of its file begins with.
    """

    label: str
    caption: Caption
    width: float
    height: float
    drawing: Markup = Markup()
    lines: tuple[Line, ...] = ()
    image: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Report:
    """HTML and the figures in it.

    Attributes:
        html: a document; `Markup` if it is a part of one.
        figures: in the order in which they are shown.
    """

    html: str
    figures: tuple[Figure, ...]


def render(template: str, **values: Any) -> Markup:
    """Fill in a template of this package.

    Args:
        template: the name of its file.
        **values: what it refers to. All but `Markup` is escaped, floating-point numbers are rounded to two decimals.

    Returns:
        Markup that is well-formed as HTML and as XML.

    Example:
        >>> figure = Figure("A <dot>", (), 9, 9, Markup('<circle r="1"/>'))
        >>> render("figure_file.svg", figure=figure, margin=0, style="").count("<title>A &lt;dot&gt;</title>")
        1
    """
    return Markup(_FORBIDDEN.sub("\ufffd", _ENVIRONMENT.get_template(template).render(values)))


def document(title: str, subtitle: str, tiles: list[tuple[str, str]], sections: str) -> str:
    """Return a whole page.

    Args:
        title: its heading.
        subtitle: a sentence below it.
        tiles: a few numbers to show large, the most important one first, and what each is.
        sections: the rest, as `Markup`.
    """
    return str(render("page.html", title=title, subtitle=subtitle, tiles=tiles, sections=sections))


def _rounded(value: Any) -> Any:
    """Round a number to two decimals, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


_ENVIRONMENT = Environment(
    loader=PackageLoader("clafusion.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_rounded,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
