"""The groups of cases, each with its contenders and its speed to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import recur_cpu_layers as layers
from benchmarks.attend_cpu_problem import drawn
from benchmarks.attend_cpu_truth import Truth as AttentionTruth
from benchmarks.contest import Run
from benchmarks.field import Truth
from benchmarks.recur_cpu_problem import Form, Problem, selective
from benchmarks.recur_cpu_rivals import FLA_DELTA, FLA_GLA, FLA_SIMPLE, LOOP, TRANSFORMERS_DELTA, TRANSFORMERS_SCAN
from benchmarks.rivals import Rival
from benchmarks.targets import OURS, Faster, Flat, Target
from foveate import causal

ATTENTION = "causal attention"  # ours
TIMES_ATTENTION = 3.0
STATES = 16  # of a channel of a selective scan
LONG = 16384  # tokens at which that is wanted

GATED_DELTA = Form("token", delta=True)
FORMS = {
    "no decay": Form("none"),
    "a decay a head": Form("head"),
    "a decay a token": Form("token"),
    "a decay a channel": Form("channel"),
    "gated delta rule": GATED_DELTA,
    "low rank": Form("channel", low_rank=True),
}


@dataclass(frozen=True)
class Beside:
    """Another problem of ours that a case is measured beside."""

    run: Run
    truth: Truth
    operations: float


@dataclass(frozen=True)
class Case:
    """A problem, made when its turn comes, who runs it besides us, and what is wanted of us."""

    name: str
    problem: Callable[[], Any]
    rivals: tuple[Rival, ...] = ()
    targets: tuple[Target, ...] = ()
    beside: Mapping[str, Callable[[str], Beside]] = field(default_factory=dict)  # by label, of the implementation
    dtype_name: str = "float32"


# ---- operators against what else there is ----------------------------------------------------------------------


def delta(quick: bool, training: bool = False) -> Iterator[Case]:
    """The gated delta rule."""
    heads, length, dim = (2, 130, 16) if quick else (8, 4096, 64)
    yield Case(
        f"N {length}",
        partial(GATED_DELTA.draw, heads, length, dim, training),
        (TRANSFORMERS_DELTA, FLA_DELTA, LOOP),
        (Faster(6.0 if training else 5.0, "transformers"),),
    )


def gated(quick: bool, training: bool = False) -> Iterator[Case]:
    """A decay a token and head, and a decay a token and channel."""
    heads, length, dim = (2, 130, 16) if quick else (8, 4096, 64)
    for name, rival in (("a decay a token", FLA_SIMPLE), ("a decay a channel", FLA_GLA)):
        yield Case(
            f"{name}, N {length}",
            partial(FORMS[name].draw, heads, length, dim, training),
            (rival, LOOP),
            (Faster(4.0, "fla"),),
        )


def scans(quick: bool, training: bool = False) -> Iterator[Case]:
    """Mamba's selective scan."""
    channels, length = (24, 130) if quick else (1536, 4096)
    yield Case(
        f"d {channels}, N {length}",
        partial(selective, channels, STATES, length, training),
        (LOOP, TRANSFORMERS_SCAN),
        (Faster(15.0 if training else 25.0, LOOP.label),),
    )


# ---- whole layers ----------------------------------------------------------------------------------------------


def prefill(quick: bool) -> Iterator[Case]:
    """Layers over a prompt."""
    length = 130 if quick else 4096
    for name, make, factor in (
        ("Mamba", layers.mamba, 4.0),
        ("Mamba-2", layers.mamba2, 3.0),
        ("Qwen3-Next", layers.qwen3_next, 3.0),
    ):
        yield Case(
            f"{name}, N {length}",
            partial(make, length, False, quick),
            (layers.TRANSFORMERS,),
            (Faster(factor, layers.TRANSFORMERS.label),),
        )


def steps(quick: bool) -> Iterator[Case]:
    """One cached step of each layer."""
    for name, make in (("Mamba", layers.mamba), ("Mamba-2", layers.mamba2), ("Qwen3-Next", layers.qwen3_next)):
        yield Case(
            name,
            partial(make, layers.PROMPT + 1, True, quick),
            (layers.TRANSFORMERS,),
            (Faster(1.5, layers.TRANSFORMERS.label),),
        )


# ---- length ----------------------------------------------------------------------------------------------------


def _drawn(quick: bool) -> dict[str, Callable[[int], Problem]]:
    """Every form of recurrence by its name, of a length; all of them as wide."""
    heads, dim = (2, 16) if quick else (8, 64)

    def of(form: Form) -> Callable[[int], Problem]:
        return lambda length: form.draw(heads, length, dim)

    found = {name: of(form) for name, form in FORMS.items()}
    found["scan"] = lambda length: selective(heads * dim, STATES, length)
    return found


def per_token(quick: bool) -> Iterator[Case]:
    """Time per token at ever greater lengths."""
    lengths = (128, 256) if quick else (1024, 4096, 16384, 65536, 131072)
    *shorter, longest = lengths
    labels = {OURS: longest} | {f"{OURS}, N {length}": length for length in shorter}
    kinds = _drawn(quick)
    for name in ("gated delta rule", "a decay a channel", "a decay a token", "scan"):
        yield Case(
            f"{name}, N {longest}",
            partial(kinds[name], longest),
            targets=(Flat(0.15, labels),),
            beside={label: partial(_shorter, kinds[name], length) for label, length in labels.items() if label != OURS},
        )


def _shorter(make: Callable[[int], Problem], length: int, impl: str) -> Beside:
    problem = make(length)
    return Beside(problem.run(problem.ours(impl)), problem, problem.operations)


def crossover(quick: bool) -> Iterator[Case]:
    """The same width of exact causal attention."""
    heads, dim = (2, 16) if quick else (8, 64)
    for name, make in _drawn(quick).items():
        for length in (64, 256) if quick else (256, 512, 1024, 2048, 4096, 8192, LONG):
            yield Case(
                f"{name}, N {length}",
                partial(make, length),
                targets=(Faster(TIMES_ATTENTION, ATTENTION),) if length == LONG else (),
                beside={ATTENTION: partial(_attention, heads, dim, length)},
            )


def _attention(heads: int, dim: int, length: int, impl: str) -> Beside:
    problem = drawn((1, heads, length, dim), torch.float32, causal)
    return Beside(problem.run(problem.ours("auto")), AttentionTruth(problem), problem.operations)


def conclude(group: str, cases: list[dict[str, Any]]) -> list[str]:
    """From which length on each form is faster than attention, as far as it was measured."""
    if group != "crossover":
        return []
    ratios: dict[str, dict[int, float]] = {}
    for case in cases:
        form, _, length = case["name"].rpartition(", N ")
        ratios.setdefault(form, {})[int(length)] = case["speedups"][ATTENTION]
    return [_crossover(form, by_length) for form, by_length in ratios.items()]


def _crossover(form: str, by_length: dict[int, float]) -> str:
    """
    >>> _crossover("scan", {256: 1.1, 512: 0.9, 1024: 1.2, 2048: 2.5})
    'scan: faster than causal attention from N 1024 on, 2.5x at N 2048'
    """
    longest = max(by_length)
    faster: int | None = None
    for length in sorted(by_length, reverse=True):
        if by_length[length] < 1:
            break
        faster = length
    where = "at no measured length" if faster is None else f"from N {faster} on"
    return f"{form}: faster than {ATTENTION} {where}, {by_length[longest]:.1f}x at N {longest}"


GROUPS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "delta": delta,
    "delta-training": partial(delta, training=True),
    "gated": gated,
    "gated-training": partial(gated, training=True),
    "scan": scans,
    "scan-training": partial(scans, training=True),
    "layers": prefill,
    "layers-decode": steps,
    "per-token": per_token,
    "crossover": crossover,
}
