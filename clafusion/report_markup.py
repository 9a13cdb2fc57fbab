"""Markup by small functions: whatever is not marked as safe is escaped, so that no text can become markup."""

import re
from html import escape

#: What XML 1.0 does not allow in a text.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_EMPTY = frozenset({"meta", "img"})


class Safe(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Safe:
    """One element.

    Args:
        name: of the element.
        *children: what is in it; all but `Safe` is escaped.
        **attributes: `class_` stands for `class`, `aria_label` for `aria-label`; numbers are rounded to 2 decimals,
            None is left out.

    Returns:
        The element, well-formed as HTML and as XML.

    Example:
        >>> tag("p", "1 < 2", tag("b", "!"), class_="note")
        '<p class="note">1 &lt; 2<b>!</b></p>'
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_clean(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY:
        return Safe(f"<{name}{shown}/>")
    return Safe(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: object) -> Safe:
    """Several children as one; all but `Safe` is escaped."""
    assert isinstance(children, tuple | list)
    return Safe("".join(child if isinstance(child, Safe) else _clean(str(child)) for child in children))


def drawing(width: float, height: float, label: str, *children: object, scale: float = 1.0) -> Safe:
    """An inline SVG picture with a text for those who do not see it.

    Args:
        width: in its own units, which are pixels where there is room for them.
        height: likewise.
        label: what it shows, in words.
        *children: its elements.
        scale: pixels per unit.
    """
    return tag(
        "svg", tag("title", label), *children, role="img", aria_label=label, viewBox=f"0 0 {width:g} {height:g}",
        width=width * scale, height=height * scale,
    )  # fmt: skip


def word(x: float, y: float, content: object, **attributes: object) -> Safe:
    """A text in a picture."""
    return tag("text", content, x=x, y=y, **attributes)


def table(header: list[object], rows: list[list[object]], numbers_from: int = 1, marked: int | None = None) -> Safe:
    """A table that scrolls in itself where it is too wide.

    Args:
        header: the names of the columns.
        rows: the cells.
        numbers_from: the first of the columns that hold numbers.
        marked: the row to stress.
    """

    def cells(name: str, row: list[object]) -> list[Safe]:
        return [tag(name, cell, class_="number" if place >= numbers_from else None) for place, cell in enumerate(row)]

    body = [tag("tr", *cells("td", row), class_="marked" if at == marked else None) for at, row in enumerate(rows)]
    head = tag("thead", tag("tr", *cells("th", header)))
    return tag("div", tag("table", head, tag("tbody", *body)), class_="scroll")


def figure(content: Safe, caption: object) -> Safe:
    """A picture with its caption."""
    return tag("figure", content, tag("figcaption", caption))


def section(title: str, *children: object) -> Safe:
    """A part of the page."""
    return tag("section", tag("h2", title), *children)


def _clean(value: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", value))


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
