"""HTML and SVG as values: every text is escaped unless it was made here."""

from __future__ import annotations

from html import escape

VOID = {"meta", "link", "wbr"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Markup | None


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """An element. Attributes: None leaves one out, ``_`` stands for ``-``, and one at the end is dropped.

    >>> tag("a", "<here>", href="x?a&b", class_="link", data_key=3, title=None)
    '<a href="x?a&amp;b" class="link" data-key="3">&lt;here&gt;</a>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(*children)
    return Markup(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{inside}</{name}>")


def join(*children: Child, by: str = "") -> Markup:
    """Children one after the other.

    >>> join("1 < 2", tag("b", "!"))
    '1 &lt; 2<b>!</b>'
    """
    return Markup(by.join(_safe(child) for child in children if child is not None))


def _safe(child: str) -> str:
    return child if isinstance(child, Markup) else escape(child)


def _plain(value: str | float) -> str:
    """A number without needless digits: two decimals are a hundredth of a pixel."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
