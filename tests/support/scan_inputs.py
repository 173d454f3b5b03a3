"""Random calls of the scans, their definitions as sums over pairs of tokens, and what implementations make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from foveate import causal_conv, linear_scan, scan

Call = dict[str, Any]
Operator = Callable[..., tuple[Tensor, Tensor]]
PER_TOKEN = {scan: ["x", "dt", "B", "C", "z"], linear_scan: ["x", "decay"], causal_conv: ["x"]}
CARRIED = {scan: "state", linear_scan: "state", causal_conv: "tail"}


def scan_call(channels: int = 7, states: int = 3, length: int = 65, *, groups: int = 1, batch: int = 2) -> Call:
    """Everything that a selective scan takes, in float64."""
    return {
        "x": normal(batch, length, channels),
        "dt": normal(batch, length, channels),
        "A": -4 * torch.rand(channels, states, dtype=torch.float64),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": normal(channels),
        "softplus": True,
        "state": normal(batch, channels, states),
    }


def linear_call(channels: int = 7, length: int = 65, *, batch: int = 2) -> Call:
    decay = -torch.rand(batch, length, channels, dtype=torch.float64)
    return {"x": normal(batch, length, channels), "decay": decay, "state": normal(batch, channels)}


def conv_call(channels: int = 7, width: int = 4, length: int = 65, *, batch: int = 2) -> Call:
    return {
        "x": normal(batch, length, channels),
        "weight": normal(channels, width),
        "bias": normal(channels),
        "activation": "silu",
        "tail": normal(batch, channels, width - 1),
    }


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def scan_by_pairs(x, dt, A, B, C, D, z, dt_bias, softplus, state):
    """Each token reads every earlier one through the product of what lies between."""
    step = softplus_of(dt + dt_bias) if softplus else dt + dt_bias
    share = x.shape[2] // B.shape[2]
    B, C = (v.repeat_interleave(share, 2) for v in (B, C))  # (B, N, C, S)
    logs = step.unsqueeze(-1) * A
    added = (step * x).unsqueeze(-1) * B
    states = states_by_pairs(logs, added, state)
    return ((states * C).sum(-1) + D * x) * silu(z), states[:, -1]


def states_by_pairs(logs: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """h_i = sum_j exp(sum of logs after j, up to i) added_j, and what is left of the state, all (B, N, ...)."""
    rows = []
    for i in range(logs.shape[1]):
        since = [logs[:, j + 1 : i + 1].sum(1) for j in range(-1, i + 1)]
        terms = zip(since, [state, *added[:, : i + 1].unbind(1)], strict=True)
        rows.append(sum(torch.exp(log) * term for log, term in terms))
    return torch.stack(rows, 1)


softplus_of = softplus


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The call as leaves of a graph of its own; states in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {name: v.detach() for name, v in call.items() if isinstance(v, Tensor)}
    return call | {name: v.to(wide if name == "state" else dtype).requires_grad_() for name, v in tensors.items()}


def positive(call: Call) -> Call:
    """The call without the signs of what is added up: what comes out says how much that is."""
    logs = ("dt", "A", "dt_bias", "decay")
    tensors = {name: v.detach() for name, v in call.items() if isinstance(v, Tensor)}
    return call | {name: (v if name in logs else v.abs()).clone().requires_grad_() for name, v in tensors.items()}


def outcome(operator: Operator, call: Call, impl: str, *, seed: int = 0, signs: bool = True) -> dict[str, Tensor]:
    """Out, what is carried on, and the gradient of every tensor for a fixed random direction."""
    leaves = {name: v for name, v in call.items() if isinstance(v, Tensor)}
    results = operator(**call, impl=impl)
    generator = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    seeds = seeds if signs else [x.abs() for x in seeds]
    grads = torch.autograd.grad(results, list(leaves.values()), seeds, allow_unused=True, materialize_grads=True)
    names = ("out", "carried", *(f"gradient of {name}" for name in leaves))
    return dict(zip(names, (*(x.detach() for x in results), *grads), strict=True))


def part(operator: Operator, call: Call, start: int, stop: int, **rest: Any) -> Call:
    """The call on tokens start to stop."""
    return call | {name: call[name][:, start:stop] for name in PER_TOKEN[operator] if name in call} | rest
