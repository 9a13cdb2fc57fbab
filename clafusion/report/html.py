"""The page around a report: one file without scripts that loads nothing, for any size of screen, light or dark."""

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


_LIGHT = """--page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5c6675; --line: #dde2ea;
  --one: #2563eb; --two: #d9620f; --band: #eef2f8; --bright: #fff"""
_PICTURES = """
svg { max-width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif; overflow: visible }
text { fill: var(--ink) } .tick, .note { fill: var(--soft); font-size: 10.5px }
.head { font-weight: 650; font-size: 12px }
.end { text-anchor: end } .middle { text-anchor: middle } .cell { font-size: 11px; text-anchor: middle }
.heat > rect { fill: var(--one) } .heat .bright { fill: var(--bright) } .heat > .ring { fill: none; stroke: var(--two);
  stroke-width: 3 } .chosen text { font-weight: 700 }
.stage { fill: var(--band) } .s1 { fill-opacity: .5 } .link { fill: none; stroke: var(--one); stroke-width: 2 }
.unit rect { fill: var(--card); stroke: var(--one) } .lone rect { stroke: var(--two); stroke-dasharray: 3 2 }
.lone .note { fill: var(--two) }
.grid { stroke: var(--line) } .one { stroke: var(--soft) } .line { fill: none; stroke-width: 2; stroke-linejoin: round }
.line.before { stroke: var(--soft); stroke-dasharray: 4 3 } .line.after { stroke: var(--two) }
.flat circle { display: none }
.dots.before circle { fill: var(--soft) } .dots.after circle { fill: var(--two) }
.line.c0 { stroke: var(--two) } .line.c1 { stroke: var(--one) } .line.c2 { stroke: #14966b }
.line.c3 { stroke: #a855c7 }
.line.c4 { stroke: #b58a00 } .line.c5 { stroke: #d33f6a } .line.c6 { stroke: var(--soft) }
.c0 circle { fill: var(--two) } .c1 circle { fill: var(--one) } .c2 circle { fill: #14966b }
.c3 circle { fill: #a855c7 } .c4 circle { fill: #b58a00 } .c5 circle { fill: #d33f6a } .c6 circle { fill: var(--soft) }
.interval .mean, .interval .single { fill: var(--one) } .interval .spread { stroke: var(--one); stroke-width: 2.5 }
.interval.fused .mean, .interval.fused .single { fill: var(--two) } .interval.fused .spread { stroke: var(--two) }
.interval.fused .name { font-weight: 650 } .single { fill-opacity: .45 } .other { stroke: var(--ink); stroke-width: 2 }
"""
_PAGE = """
.key { display: none }
@media (prefers-color-scheme: dark) { :root { --page: #10141b; --card: #191f29; --ink: #e8ecf2; --soft: #9aa6b6;
  --line: #2e3745; --one: #6ea0ff; --two: #ff9d57; --band: #202835; --bright: #0d1117 }
  img { filter: brightness(1.7) } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 20px 14px 60px }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4em 0 .1em } h2 { font-size: 1.2rem; margin: 0 0 .3em }
h3 { font-size: 1rem; margin: 1.2em 0 .4em } p { margin: .3em 0 .9em; max-width: 70ch }
p, figcaption { color: var(--soft) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 18px 16px;
  margin: 16px 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 10px; margin: 16px 0 }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 10px 14px;
  color: var(--soft); font-size: .86rem }
.tiles b { display: block; color: var(--ink); font-size: 1.45rem; line-height: 1.3 }
.tiles div.main { border-color: var(--two); box-shadow: inset 0 3px var(--two) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .93rem }
th, td { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 500 }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.marked td { font-weight: 650 } td.bar { width: 30% } .meter { display: block; height: 9px; margin-top: 8px;
  min-width: 70px; border-radius: 5px; background: var(--band) } .meter i { display: block; height: 9px;
  border-radius: 5px; background: var(--one) } .marked .meter i { background: var(--two) }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px 26px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 14px 30px }
.charts svg { width: 100%; max-width: 480px }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 16px }
.maps img { image-rendering: pixelated; border: 1px solid var(--line); border-radius: 6px; display: block;
  max-width: 100%; background: var(--band) }
figure { margin: 0; min-width: 0 } figcaption { font-size: .84rem; overflow-wrap: anywhere }
figcaption b { color: var(--ink) }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 14px 0 6px; padding: 0;
  font-size: .88rem } .legend svg { display: inline-block; margin-right: 6px; vertical-align: -1px }
summary { cursor: pointer; padding: 4px 0; font-weight: 550 } details td { overflow-wrap: anywhere }
code { font-size: .85em; overflow-wrap: anywhere }
@media (max-width: 520px) { td:has(.meter), th:last-child:empty { display: none } }
details section { border: 0; padding: 4px 0; margin: 10px 0 }
"""
_STYLE = f":root {{ color-scheme: light dark; {_LIGHT} }}{_PAGE}{_PICTURES}"
_COLOURS = dict(re.findall(r"(--\w+): (#\w+)", _LIGHT))
#: The style of a picture in a file of its own: light, and without variables, which few programs know.
PLAIN_STYLE = re.sub(r"var\((--\w+)\)", lambda found: _COLOURS[found[1]], _PICTURES) + ".ground { fill: #fff }"


def page(title: str, subtitle: str, *parts: Safe) -> str:
    """A whole document.

    Args:
        title: its heading.
        subtitle: a sentence below it.
        *parts: what follows.

    Returns:
        HTML that is well-formed XML, too, but for its first line.
    """
    head = tag(
        "head", tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title), tag("style", Safe(_STYLE)),
    )  # fmt: skip
    body = tag("body", tag("main", tag("h1", title), tag("p", subtitle), *parts))
    return join([Safe("<!DOCTYPE html>\n"), tag("html", head, body, lang="en"), Safe("\n")])


def tiles(values: list[tuple[str, str]]) -> Safe:
    """A few numbers, large, with what they are; the first one matters most."""
    styles = ["main", *[None] * len(values)]
    found = [
        tag("div", tag("b", value), name, class_=style) for (value, name), style in zip(values, styles, strict=False)
    ]
    return tag("div", *found, class_="tiles")


def meter(share: float) -> Safe:
    """A bar of a share between 0 and 1."""
    return tag("span", tag("i", style=f"width:{100 * min(max(share, 0), 1):.1f}%"), class_="meter", aria_hidden="true")


def folded(summary: str, content: Safe) -> Safe:
    """What is shown on demand."""
    return tag("details", tag("summary", summary), content)
