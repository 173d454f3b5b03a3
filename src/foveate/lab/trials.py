"""Small calls of every operator, on which each implementation is held against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.attention import ATTEND, attend, sigmoid
from foveate.attention.key_ranges import KeyRanges
from foveate.attention.ranges import ATTEND_RANGES, attend_ranges
from foveate.attention.stored import STORED, Segment, attend_stored, quantise
from foveate.dispatch import Operator
from foveate.patterns import causal, sinks, window
from foveate.recurrence import CAUSAL_CONV, LINEAR_SCAN, RECUR, SCAN, causal_conv, linear_scan, recur, scan
from foveate.recurrence.bi_wkv import BI_WKV, bi_wkv
from foveate.recurrence.ssm import EVOLVE, EVOLVE_SHARED, evolve, evolve_shared
from foveate.recurrence.ttt import TTT, ttt_linear, ttt_mlp

LENGTH = 130
TOLERANCE = 5e-4  # outputs are about 1; float32 on any device

Verdict = Literal["runs", "does not run", "disagrees"]
Run = Callable[..., Any]  # with impl=


@dataclass(frozen=True)
class Trial:
    """One implementation on one call."""

    operator: str
    implementation: str
    device: str
    call: str
    verdict: Verdict
    detail: str = ""


def trials() -> Iterator[Trial]:
    """Every implementation of every operator, on every device there is."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for operator, calls in CALLS.items():
            for call, run in calls(numbers(device)).items():
                for name in operator.names:
                    yield _tried(operator.name, name, device, call, run)


def _tried(operator: str, name: str, device: str, call: str, run: Run) -> Trial:
    try:
        got = _out(run(impl=name))
    except NotImplementedError as refused:
        reason = str(refused)
        return Trial(operator, name, device, call, "does not run", reason.partition(": ")[2] or reason)
    error = (got - _out(run(impl="reference"))).abs().max().item()
    if error <= TOLERANCE:
        return Trial(operator, name, device, call, "runs")
    return Trial(operator, name, device, call, "disagrees", f"differs from the definition by {error:.1e}")


def _out(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def numbers(device: str) -> Callable[..., Tensor]:
    """Standard normal numbers of a shape, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)


def _attend(x: Callable[..., Tensor]) -> dict[str, Run]:
    q, k, v = x(1, 2, LENGTH, 16), x(1, 1, LENGTH, 16), x(1, 1, LENGTH, 16)
    return {
        "causal": partial(attend, q, k, v, causal),
        "window": partial(attend, q, k, v, window(16) & causal | sinks(2)),
        "sigmoid weights": partial(attend, q, k, v, weights=sigmoid(bias=-4.0)),
        "soft-cap": partial(attend, q, k, v, causal, softcap=20.0),
    }


def _attend_ranges(x: Callable[..., Tensor]) -> dict[str, Run]:
    q, k, v = x(1, 2, 1, 16), x(1, 1, LENGTH, 16), x(1, 1, LENGTH, 16)
    seen = KeyRanges.of([((0, 2), (LENGTH - 60, LENGTH))])
    return {
        "first and recent": partial(attend_ranges, q, k, v, seen),
        "with a bias": partial(attend_ranges, q, k, v, seen, bias=x(1, 2, 1, LENGTH)),
    }


def _stored(x: Callable[..., Tensor]) -> dict[str, Run]:
    q, k, v = x(1, 4, 1, 16), x(1, 2, LENGTH, 16), x(1, 2, LENGTH, 16)
    pages = torch.tensor([[[3, 1], [0, 2]]], device=q.device)
    ragged = Segment(x(4, 1, 8, 16), x(4, 1, 8, 16), pages, torch.tensor([[13, 16]], device=q.device))
    codes = {
        name: Segment(quantise(k, name, by="channel", group=32), quantise(v, name)) for name in ("int8", "int4", "fp8")
    }
    return {name: partial(attend_stored, q, [one, ragged]) for name, one in codes.items()}


def _recur(x: Callable[..., Tensor]) -> dict[str, Run]:
    q, k, v = x(1, 2, LENGTH, 16), torch.nn.functional.normalize(x(1, 2, LENGTH, 16), dim=-1), x(1, 2, LENGTH, 16)
    return {
        "decay per head": partial(recur, q, k, v, decay=-x(2).abs()),
        "delta rule": partial(recur, q, k, v, beta=x(1, 2, LENGTH).sigmoid()),
        "low rank": partial(recur, q, k, v, low_rank=(-k, 0.5 * k)),
    }


def _scan(x: Callable[..., Tensor]) -> dict[str, Run]:
    tokens, dt, A, read = x(1, LENGTH, 6), x(1, LENGTH, 6), -x(6, 4).abs(), x(1, LENGTH, 4)
    return {"selective": partial(scan, tokens, dt, A, read, read, softplus=True)}


def _linear_scan(x: Callable[..., Tensor]) -> dict[str, Run]:
    return {"linear": partial(linear_scan, x(1, LENGTH, 6), -x(1, LENGTH, 6).abs())}


def _causal_conv(x: Callable[..., Tensor]) -> dict[str, Run]:
    return {"4 taps": partial(causal_conv, x(1, LENGTH, 6), x(6, 4), x(6), activation="silu")}


def _evolve(x: Callable[..., Tensor]) -> dict[str, Run]:
    transition = torch.complex(-x(6, 4).abs(), x(6, 4))
    return {"diagonal": partial(evolve, x(1, LENGTH, 6), transition, transition, transition)}


def _evolve_shared(x: Callable[..., Tensor]) -> dict[str, Run]:
    inputs = torch.complex(x(1, LENGTH, 4), x(1, LENGTH, 4))
    return {"shared": partial(evolve_shared, inputs, torch.complex(-x(4).abs(), x(4)))}


def _ttt(x: Callable[..., Tensor]) -> dict[str, Run]:
    q, k, v = (0.3 * x(1, 2, LENGTH, 8) for _ in range(3))
    eta, norm = 0.1 * x(1, 2, LENGTH).sigmoid(), (1 + 0.1 * x(2, 8), 0.1 * x(2, 8))
    layers = 0.3 * x(2, 9, 16), 0.3 * x(2, 17, 8)
    return {
        "linear": partial(ttt_linear, q, k, v, eta, 0.3 * x(2, 9, 8), norm),
        "two layers": partial(ttt_mlp, q, k, v, eta, layers, norm),
    }


def _bi_wkv(x: Callable[..., Tensor]) -> dict[str, Run]:
    return {"both sides": partial(bi_wkv, x(1, LENGTH, 6), x(1, LENGTH, 6), x(6).abs() / 10, x(6))}


CALLS: dict[Operator[Any, Any], Callable[[Callable[..., Tensor]], dict[str, Run]]] = {
    ATTEND: _attend,
    ATTEND_RANGES: _attend_ranges,
    STORED: _stored,
    RECUR: _recur,
    SCAN: _scan,
    LINEAR_SCAN: _linear_scan,
    CAUSAL_CONV: _causal_conv,
    EVOLVE: _evolve,
    EVOLVE_SHARED: _evolve_shared,
    TTT: _ttt,
    BI_WKV: _bi_wkv,
}
