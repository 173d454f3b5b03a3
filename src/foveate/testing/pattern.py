"""check_pattern: what kernels run is what the definition shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from foveate.patterns import Layout, Pattern
from foveate.testing import pattern_answers, pattern_attention
from foveate.testing.pattern_case import PatternCase
from foveate.testing.report import Report, fresh_seed, verdict

LENGTHS = (1, 37, 65, 130)

PROPERTIES: dict[str, Callable[[PatternCase], None]] = {
    "selection": pattern_answers.selection,
    "bounds": pattern_answers.bounds,
    "causality": pattern_answers.causality,
    "decoding": pattern_answers.decoding,
    "attention": pattern_attention.attention,
    "half precision": pattern_attention.half_precision,
    "fully masked rows": pattern_attention.fully_masked_rows,
}


def check_pattern(
    pattern: Pattern,
    *,
    layout: Layout | None = None,
    lengths: Iterable[int] | None = None,
    seed: int | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Hold everything a pattern answers against its definition, ``visible``.

    >>> from foveate import causal, window
    >>> print(check_pattern(window(5) & causal, seed=0))
    window(5) & causal: 7 passed (seed=0)

    The selections that kernels run, the bounds of random boxes, ``is_causal``, rows decoded one at a time, and
    attention with its gradients; dynamic patterns on random queries and keys.

    Args:
        pattern: static or dynamic, resolved or not.
        layout: where its tokens live, for a pattern on a grid or on points.
        lengths: numbers of keys; those of the layout, or a few odd ones, by default.
        seed: of all random numbers; a fresh one by default. Every failure names it.
        raise_on_failure: whether a failure raises, or is only reported.

    Raises AssertionError naming each property that fails, with the numbers and the seed; TypeError for what is
    no pattern.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"check_pattern takes a pattern such as window(64) & causal; got {pattern!r}")
    seed = fresh_seed() if seed is None else seed
    if lengths is None:
        lengths = LENGTHS if layout is None or layout.length is None else (layout.length,)
    sights = [PatternCase(pattern, layout, n, m) for m in lengths for n in dict.fromkeys((m, 1 + m // 3))]
    checks = [
        verdict(name, seed, [(f"{case}: ", partial(test, case)) for case in sights])
        for name, test in PROPERTIES.items()
    ]
    report = Report(str(pattern), seed, tuple(checks))
    if raise_on_failure:
        report.raise_failures()
    return report
