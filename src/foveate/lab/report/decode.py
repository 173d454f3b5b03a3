"""The report's section on decoding: quality against bytes, against budgets, and all figures."""

from __future__ import annotations

import re
from collections.abc import Callable

from foveate.lab.compare.words import percent, seconds, size
from foveate.lab.decode.results import Decoding, Decodings
from foveate.lab.report.curves import Curve, Dot, in_two_sizes, loss_plot, losses, on_front, panel
from foveate.lab.report.markup import Markup, join, tag
from foveate.lab.report.page import refusals

KEYS = 1000  # numbers of marks begin here: those below belong to the prefill
PANEL = (224, 150)


def decode_section(found: Decodings) -> Markup:
    """Everything about decoding."""
    settings = found.settings
    what = (
        f"A prompt of {settings['length'] - settings['continued']:,} tokens is read, then {settings['continued']} more "
        f"go through the cache one by one, as when text is written, {settings['windows']} times. Loss is that of these "
        "tokens; what is named with a budget was tried at several values of it."
    )
    stopped = "Stopped early: the figures are those of the mechanisms measured so far."
    return tag(
        "section",
        tag("h2", "Decoding"),
        tag("p", stopped, class_="stopped") if found.interrupted else None,
        tag("p", what),
        _plot(found, "bytes held of a token →", lambda one: (one.held_bytes + one.host_bytes) / found.tokens),
        tag("p", "Held: memory behind the cache, the host's included, over the tokens of the text. "
            "Up and to the left is better; the line joins what nothing else beats.", class_="hint"),
        _plot(found, "bytes that a token's attention reads →", lambda one: one.read_bytes),
        tag("p", "Read: keys and values that the attention of one token reads at the end of the text, and keys that "
            "a choice by content looks at; what comes from the host's memory is in it.", class_="hint"),
        _budgets(found),
        _table(found),
        refusals(found.refused),
    )  # fmt: skip


def curves(found: Decodings, cost: Callable[[Decoding], float]) -> list[Curve]:
    """A curve for each method, and exact attention's point."""
    groups = {"exact": [found.exact], **found.by_method}
    plain = {
        name: tuple(Dot(max(cost(one), 1e-9), one.quality.change, _said(one)) for one in group)
        for name, group in groups.items()
    }
    best = on_front([Curve(name, 0, "other", dots) for name, dots in plain.items()])
    roles = {
        name: "exact" if name == "exact" else "front" if best & set(dots) else "other" for name, dots in plain.items()
    }
    return [Curve(name, KEYS + number, roles[name], dots) for number, (name, dots) in enumerate(plain.items())]


def _said(one: Decoding) -> str:
    return f"{one.name}: {percent(one.quality.change, sign=True)} bits per byte"


def _plot(found: Decodings, title: str, cost: Callable[[Decoding], float]) -> Markup:
    drawn = curves(found, cost)

    def plot(width: int, height: int) -> Markup:
        return loss_plot(drawn, width, height, title=title, loss="bits per byte", said=lambda value: size(round(value)))

    return tag("figure", in_two_sizes(plot))


def _budgets(found: Decodings) -> Markup | None:
    """A small plot for each method with a budget."""
    named = {name: [one for one in group if one.value is not None] for name, group in found.by_method.items()}
    whole = curves(found, lambda one: one.value or 1.0)
    y = losses(whole, 0, 1)
    panels = []
    for curve in whole:
        group = named.get(curve.name, [])
        if len(group) > 1:
            dots = tuple(Dot(float(one.value or 0), one.quality.change, _said(one)) for one in group)
            drawn = panel(Curve(curve.name, curve.key, "front", dots), y, *PANEL, group[0].option)
            panels.append(tag("figure", drawn, tag("figcaption", tag("code", curve.name)), class_=f"k{curve.key}"))
    if not panels:
        return None
    said = "Change in bits per byte against the option that says how much a method spends, all on one scale."
    return join(tag("h3", "Loss against budget"), tag("p", said, class_="hint"), tag("div", *panels, class_="panels"))


COLUMNS = (
    "Mechanism", "A token takes", "Speed-up", "A token holds", "A token reads", "Bits per byte", "Change, 95 %",
    "Same top-1", "Prompt's pairs",
)  # fmt: skip


def _table(found: Decodings) -> Markup:
    heads = [
        tag("th", tag("button", name, type="button"), scope="col", class_="number" if at else "text", data_name=name)
        for at, name in enumerate(COLUMNS)
    ]
    keys = {name: KEYS + number for number, name in enumerate(["exact", *found.by_method])}
    rows = [_row(found, one, keys[one.method]) for one in (found.exact, *found.entries)]
    drawn = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    return join(
        tag("h3", "All figures of decoding"),
        tag("div", drawn, class_="scroll", tabindex=0, role="region", aria_label="All figures of decoding"),
    )


def _row(found: Decodings, one: Decoding, key: int) -> Markup:
    quality, took, speed = one.quality, found.seconds(one), found.speed(one)
    exact = one is found.exact
    interval = f"{percent(quality.change_low, sign=True)} to {percent(quality.change_high, sign=True)}"
    aside = tag("small", f"{size(one.host_bytes)} on the host") if one.host_bytes else None
    back = tag("small", f"{size(one.fetched_bytes)} from the host") if one.fetched_bytes else None
    cells = [
        (took or 0.0, "-" if took is None else seconds(took)),
        (speed or 0.0, "-" if speed is None else "1×" if exact else f"{speed:.2f}×"),
        (
            one.held_bytes,
            join(size(round(one.held_bytes / found.tokens)), tag("small", f"{size(one.held_bytes)} in all"), aside),
        ),
        (one.read_bytes, join(size(one.read_bytes), back)),
        (quality.loss, f"{quality.loss:.4f}"),
        (quality.change, "" if exact else join(percent(quality.change, sign=True), tag("small", interval))),
        (quality.agreement, percent(quality.agreement)),
        (one.pairs, percent(one.pairs)),
    ]
    parts = re.split(r"(?<=[_(,|&=])", one.name)
    head = tag("th", tag("div", tag("code", join(*parts, by=str(tag("wbr"))))), scope="row", data_value=one.name)
    body = (tag("td", said, data_value=repr(float(value))) for value, said in cells)
    return tag("tr", head, *body, class_=f"{'exact' if exact else 'other'} k{key}")
