"""The report's lists of mechanisms: the table of figures, the pictures of masks, and what each one is."""

from __future__ import annotations

import re

from foveate.lab.compare.results import Entry, Results
from foveate.lab.compare.words import percent, seconds, size
from foveate.lab.report.markup import Markup, join, tag
from foveate.lab.report.plots import key, mask_symbol, mask_use, role


def columns(results: Results) -> list[tuple[str, str]]:
    """Headings and what they head; a loss that is a distance is no change of anything else."""
    measure = results.measure
    loss = [] if measure.is_distance else [measure.loss.capitalize()]
    change = f"{measure.loss.capitalize() if measure.is_distance else 'Change'}, 95 %"
    names = ["Speed-up", measure.passes.capitalize(), "Peak memory", *loss, change, measure.agreement.capitalize()]
    return [("Mechanism", "text"), *((name, "number") for name in (*names, "Mass kept", "Pairs seen"))]


def code_name(entry: Entry) -> Markup:
    """The name as code, with places where it may break."""
    parts = re.split(r"(?<=[_(,|&])", entry.name)
    return tag("code", join(*parts, by=str(tag("wbr"))))


# ---- the table ---------------------------------------------------------------------------------------------


def figures_table(results: Results) -> Markup:
    """All figures, fastest first; a click on a head sorts by that column."""
    drawn = tag(
        "table",
        tag("thead", tag("tr", *(_head(name, kind) for name, kind in columns(results)))),
        tag("tbody", *(_row(results, entry) for entry in results.ranked)),
    )
    explained = "" if results.measure.is_distance else f"Change is that of the {results.measure.loss}. "
    ahead = any(entry.contender.note for entry in results.entries)
    return tag(
        "section",
        tag("h2", "All figures"),
        tag("div", drawn, class_="scroll", tabindex=0, role="region", aria_label="All figures"),
        tag("p", f"{explained}A head sorts by its column.", class_="hint"),
        tag("p", "* See the note on this mechanism below.", class_="hint") if ahead else None,
    )


def _head(name: str, kind: str) -> Markup:
    button = tag("button", name, type="button")
    order = "descending" if name == "Speed-up" else None
    return tag("th", button, scope="col", class_=kind, data_name=name, aria_sort=order)


def _row(results: Results, entry: Entry) -> Markup:
    quality, looked, number = entry.quality, entry.looked, key(results, entry)
    distance = results.measure.is_distance
    cells = [
        (results.speed(entry), _speed(results, entry)),
        (results.seconds(entry), seconds(results.seconds(entry))),
        (entry.memory.peak_bytes or 0, size(entry.memory.peak_bytes)),
        *([] if distance else [(quality.loss, f"{quality.loss:.4f}")]),
        (quality.change, None if entry is results.exact else _change(entry, sign=not distance)),
        (quality.agreement, f"{quality.agreement:.4f}" if distance else percent(quality.agreement)),
        (looked.mass, percent(looked.mass)),
        (looked.visible, join(percent(looked.visible), tag("small", f"{percent(looked.computed)} in tiles"))),
    ]
    named = tag("div", mask_use(f"mask{number}", None), tag("div", code_name(entry), _paper(results, entry)))
    return tag(
        "tr",
        tag("th", named, scope="row", data_value=entry.name),
        *(tag("td", said, data_value=repr(float(value))) for value, said in cells),
        class_=f"{role(results, entry)} k{number}",
    )


def _speed(results: Results, entry: Entry) -> Markup:
    speed, fastest = entry.speedup, max(results.speed(other) for other in results.ranked)
    said = "1×" if entry is results.exact else f"{speed.median:.2f}×"
    bar = tag("span", class_="bar", style=f"--share:{results.speed(entry) / fastest:.3f}")
    return join(said, tag("small", f"{speed.low:.2f} to {speed.high:.2f}"), bar)


def _change(entry: Entry, *, sign: bool) -> Markup:
    quality = entry.quality
    low, high = percent(quality.change_low, sign=sign), percent(quality.change_high, sign=sign)
    return join(percent(quality.change, sign=sign), tag("small", f"{low} to {high}"))


def _paper(results: Results, entry: Entry) -> Markup | None:
    about = entry.contender
    if entry is results.exact:
        return tag("small", about.note)
    link = _link(about.url, about.url.rpartition("/")[2], about.paper)
    star = "*" if about.note else None
    return tag("small", join(link, star, by=" ")) if link or star else None


def _link(url: str, said: str, title: str | None = None) -> Markup | None:
    return tag("a", said, href=url, title=title) if url.startswith("https://") else None


# ---- masks -------------------------------------------------------------------------------------------------


def symbols(results: Results) -> Markup:
    """Every mask once, out of sight, for others to use."""
    drawn = [mask_symbol(entry, f"mask{key(results, entry)}") for entry in results.ranked]
    return tag("svg", *drawn, class_="symbols", aria_hidden="true")


def masks(results: Results) -> Markup:
    """Where each mechanism looks."""
    said = (
        "Queries downwards, keys to the right, over the whole window. The darker a cell, the more of its pairs are "
        "seen, over all heads and layers; what depends on the text was chosen on the first window."
    )
    figures = [_mask(results, entry) for entry in results.ranked]
    return tag(
        "section", tag("h2", "Where it looks"), tag("div", *figures, class_="masks"), tag("p", said, class_="hint")
    )


def _mask(results: Results, entry: Entry) -> Markup:
    number = key(results, entry)
    said = f"{percent(entry.looked.visible)} of pairs, {percent(entry.looked.mass)} of weight"
    caption = tag("figcaption", code_name(entry), tag("small", said))
    return tag("figure", mask_use(f"mask{number}", f"Mask of {entry.name}"), caption, class_=f"k{number}")


# ---- what they are -----------------------------------------------------------------------------------------


def mechanisms(results: Results) -> Markup | None:
    """What each mechanism computes, and who proposed it."""
    listed = [join(tag("dt", code_name(entry)), tag("dd", _described(entry))) for entry in results.entries]
    if not listed:
        return None
    return tag("section", tag("h2", "What they are"), tag("dl", *listed, class_="mechanisms"))


def _described(entry: Entry) -> Markup:
    about = entry.contender
    lines = [
        tag("p", typeset(about.formula), class_="formula") if about.formula else None,
        tag("p", "Looks at ", tag("code", about.pattern)) if about.pattern != entry.name else None,
        tag("p", _link(about.url, about.paper) or about.paper) if about.paper else None,
        tag("p", f"* {about.note}") if about.note else None,
    ]
    return join(*lines) if any(lines) else tag("p", "A pattern, with exact attention over its pairs.")


def typeset(formula: str) -> Markup:
    """A formula with what follows ``_`` and ``^`` lowered and raised.

    >>> typeset("o_i = e^{a + b}")
    'o<sub>i</sub> = e<sup>a + b</sup>'
    """
    parts = re.split(r"([_^])(?:\{([^{}]*)\}|(\w))", formula)
    written: list[str] = [parts[0]]
    for mark, braced, single, rest in zip(*(parts[start::4] for start in (1, 2, 3, 4)), strict=True):
        written += [tag("sub" if mark == "_" else "sup", braced or single or ""), rest]
    return join(*written)
