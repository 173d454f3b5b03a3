"""check_mixer: every property that a mixer's row lays claim to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from foveate.catalogue.registry import Feature, Row, row
from foveate.mixers.base import Mixer
from foveate.testing import batching, contract, equivalence, extremes, precision
from foveate.testing import time as order
from foveate.testing.case import Subject
from foveate.testing.report import Check, Report, fresh_seed, verdict


@dataclass(frozen=True)
class Property:
    """What must hold, of mechanisms that claim the features it needs, in causal form, the other, or both."""

    name: str
    test: Callable[[Subject], None]
    needs: frozenset[Feature] = frozenset()
    causal: bool | None = None

    def applies(self, subject: Subject) -> bool:
        return self.needs <= subject.row.supports and self.causal in (None, subject.causal)


def needing(*features: Feature) -> frozenset[Feature]:
    return frozenset(features)


PROPERTIES = (
    Property("implementations agree", precision.implementations_agree),
    Property("odd lengths", precision.odd_lengths),
    Property("gradients", precision.gradients),
    Property("differences", precision.differences),
    Property("single precision", precision.single_precision),
    Property("half precision", precision.half_precision),
    Property("causality", order.causality, needing("causal"), causal=True),
    Property("causal gradients", order.causal_gradients, needing("causal"), causal=True),
    Property("decode", order.decoding, needing("decode"), causal=True),
    Property("prefill", order.prompts, needing("decode"), causal=True),
    Property("prefill in chunks", order.chunks, needing("decode"), causal=True),
    Property("branches", order.branches, needing("decode"), causal=True),
    Property("decoding gradients", order.decoding_gradients, needing("decode"), causal=True),
    Property("packed", order.packed, needing("packed")),
    Property("padding", batching.padding, needing("padding")),
    Property("neighbours", batching.neighbours),
    Property("empty batch", extremes.empty_batch),
    Property("equal tokens", extremes.equal_tokens),
    Property("fully masked rows", batching.fully_masked_rows, needing("padding")),
    Property("full budget", equivalence.full_budget),
    Property("shared keys", equivalence.shared_keys, needing("gqa")),
    Property("cross", equivalence.cross, needing("cross"), causal=False),
    Property("refusals", contract.refusals),
    Property("costs", contract.costs),
    Property("decoding costs", contract.decoding_costs, needing("decode"), causal=True),
)


def check_mixer(
    mixer: type[Mixer] | Row | str,
    *,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Put a mixer to every property that its registered features lay claim to.

    >>> print(check_mixer("linear_transformer", seed=0))
    linear_transformer: 24 passed, 1 skipped (seed=0)

    Args:
        mixer: a registered mixer class, its row, or its name.
        seed: of all random numbers; a fresh one by default. Every failure names it.
        options: arguments of the mixer, added to its class's ``tiny``.
        raise_on_failure: whether a failure raises, or is only reported.

    Forward and gradients are compared with the same mixer whose operators run their definitions
    (:func:`reference_only`), and gradients with differences of outputs besides. Padding, packing, batching,
    decoding and causality are compared with sequences run on their own. A class may define:

        tiny                options under which a few dozen tokens are already sparse
        full_budget         options under which it is plain attention
        exact(x, layout)    plain attention with its parameters, if it is not an ``AttentionMixer``
        grids               layouts to run on, if it lives on grids
        exempt              properties that fail by design, each with the reason, as in
                            {"causality": "what it keeps is chosen by the last queries"}

    Raises AssertionError naming each property that fails, with the numbers and the seed; TypeError for what is
    no registered mixer.
    """
    found = as_row(mixer)
    seed = fresh_seed() if seed is None else seed
    chosen = getattr(found.mixer, "tiny", {}) | (options or {})
    forms: tuple[Feature, ...] = ("causal", "noncausal")
    subjects = {form: Subject(found, chosen, form == "causal") for form in forms if form in found.supports}
    exempt = exemptions(found)
    checks = [
        Check(prop.name, "skipped", f"by design: {exempt[prop.name]}")
        if prop.name in exempt
        else verdict(prop.name, seed, runs_of(prop, subjects))
        for prop in PROPERTIES
    ]
    report = Report(found.name, seed, tuple(checks))
    if raise_on_failure:
        report.raise_failures()
    return report


def runs_of(prop: Property, subjects: Mapping[Feature, Subject]) -> list[tuple[str, Callable[[], None]]]:
    """The property in each form it applies to; the form is named where there are two."""
    return [
        (f"{form}: " if len(subjects) > 1 else "", partial(prop.test, subject))
        for form, subject in subjects.items()
        if prop.applies(subject)
    ]


def exemptions(found: Row) -> dict[str, str]:
    """The properties that a mixer's class says fail by design, and why."""
    exempt: dict[str, str] = getattr(found.mixer, "exempt", {})
    unknown = exempt.keys() - {prop.name for prop in PROPERTIES}
    if unknown:
        raise ValueError(f"{found.name} is exempt from {', '.join(sorted(unknown))}, which no property is called")
    return exempt


def as_row(mixer: type[Mixer] | Row | str) -> Row:
    if isinstance(mixer, str):
        return row(mixer)
    if isinstance(mixer, Row):
        return mixer
    if isinstance(mixer, type) and issubclass(mixer, Mixer) and "row" in vars(mixer):
        return mixer.row
    raise TypeError(
        "check_mixer takes a mixer class registered by @foveate.catalogue.registry.register(...), its row or its "
        f"name; got {mixer!r}"
    )
