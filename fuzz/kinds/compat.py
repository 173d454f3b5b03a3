"""Calls spelled for other libraries, against the loops that hold for recur and the scans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.compat import fla, mamba
from fuzz.cases import kind
from fuzz.draw import Draw
from fuzz.judge import Judge, demand
from fuzz.kinds.recur import Rule
from fuzz.kinds.scans import Call, by_token, taps
from fuzz.settings import anything

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
RULES = {  # functions by what their state does: the decay's shape, and whether there is a beta
    "chunk_gla": ("channel", False),
    "fused_recurrent_gla": ("channel", False),
    "chunk_simple_gla": ("token", False),
    "fused_recurrent_simple_gla": ("token", False),
    "chunk_delta_rule": ("none", True),
    "fused_recurrent_delta_rule": ("none", True),
    "chunk_gated_delta_rule": ("token", True),
    "fused_recurrent_gated_delta_rule": ("token", True),
    "chunk_kda": ("channel", True),
    "fused_recurrent_kda": ("channel", True),
}


@kind("compat_fla", 2)
def linear(draw: Draw) -> None:
    name = draw.one(tuple(RULES))
    decay, has_beta = RULES[name]
    batch, length, heads = draw.one((1, 1, 2)), draw.length(17) or 1, draw.one((1, 2, 3))
    dim, value_dim, dtype = draw.dim(33), draw.dim(33), draw.one(DTYPES)
    lengths = [n for n in draw.split(length) if n] if batch == 1 and draw.chance(0.3) else None
    shape = (batch, length, heads)
    given = {
        "q": draw.normal(*shape, dim),
        "k": normalize(draw.normal(*shape, dim), dim=-1),
        "v": draw.normal(*shape, value_dim),
    }
    if decay != "none":
        given["decay"] = -draw.uniform(*((*shape, dim) if decay == "channel" else shape))
    if has_beta:
        given["beta"] = draw.uniform(*shape)
    given = {n: x.to(dtype) for n, x in given.items()}
    if draw.chance(0.4):
        given["state"] = draw.normal(len(lengths) if lengths else batch, heads, dim, value_dim).float()
    rule = Rule(tuple(given), dim**-0.5, lengths)
    named = {"decay": "gk" if name == "fused_recurrent_gla" else "g", "state": "initial_state"}
    arguments: dict[str, Any] = {named.get(n, n): draw.placed(x) for n, x in given.items()}
    if lengths is not None:
        arguments["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad(), anything(draw, devices=False):
        out, state = getattr(fla, name)(**arguments, output_final_state=True)
    demand(out.dtype == dtype, f"{name} gives {out.dtype} for {dtype}")
    clean = [x if n == "state" else x.transpose(1, 2) for n, x in given.items()]

    def definition(*tensors: Tensor) -> list[Tensor]:
        heads_first, last = rule(*tensors)
        return [heads_first.transpose(1, 2), last]

    def sizes(*tensors: Tensor) -> list[Tensor]:
        return [x.abs() + x.abs().amax() for x in definition(*tensors)]

    Judge(definition, clean, torch.float32, sizes, ulps=16)([name, f"state of {name}"], [out, state])


@kind("compat_mamba", 2)
def selective(draw: Draw) -> None:
    """selective_scan_fn and causal_conv1d_fn, channels before tokens."""
    batch, channels, length = draw.one((1, 2)), draw.whole(1, 9), draw.length(17) or 1
    dtype = draw.one(DTYPES)
    if draw.chance(0.5):
        _conv(draw, batch, channels, length, dtype)
        return
    states = draw.one((1, 2, 4, 16))
    given = {
        "x": draw.tensor(batch, length, channels, dtype=dtype),
        "dt": draw.tensor(batch, length, channels, dtype=dtype),
        "A": -draw.uniform(channels, states).float(),
        "B": draw.tensor(batch, length, states, dtype=dtype),
        "C": draw.tensor(batch, length, states, dtype=dtype),
    }
    if draw.chance(0.5):
        given["D"] = draw.tensor(channels, dtype=torch.float32)
    if draw.chance(0.5):
        given["z"] = draw.tensor(batch, length, channels, dtype=dtype)
    call = Call(
        mamba.selective_scan_fn, by_token, given, ("x", "dt", "B", "C", "z"), "state", torch.float32, {"softplus": True}
    )
    turned = {n: draw.placed(x.mT.contiguous() if n in call.timed else x) for n, x in given.items()}
    u, dt, A, B, C = (turned.pop(n) for n in ("x", "dt", "A", "B", "C"))
    with torch.no_grad(), anything(draw, devices=False):
        out, state = mamba.selective_scan_fn(u, dt, A, B, C, **turned, delta_softplus=True, return_last_state=True)
    judge = Judge(call.definition, list(given.values()), torch.float32, call.sizes, ulps=16)
    judge(["selective_scan_fn", "state"], [out.mT, state])


def _conv(draw: Draw, batch: int, channels: int, length: int, dtype: torch.dtype) -> None:
    given = {
        "x": draw.tensor(batch, length, channels, dtype=dtype),
        "weight": draw.tensor(channels, draw.whole(2, 4), dtype=dtype),
    }
    if draw.chance(0.5):
        given["bias"] = draw.tensor(channels, dtype=dtype)
    options: dict[str, Any] = {"activation": "silu"} if draw.chance(0.5) else {}
    call = Call(mamba.causal_conv1d_fn, taps, given, ("x",), "tail", torch.float32, options)
    rest: dict[str, Any] = {n: draw.placed(x) for n, x in given.items() if n != "x"}
    with torch.no_grad(), anything(draw, devices=False):
        out = mamba.causal_conv1d_fn(draw.placed(given["x"].mT.contiguous()), **rest, **options)
    assert isinstance(out, Tensor)
    judge = Judge(call.definition, list(given.values()), torch.float32, call.sizes, ulps=16)
    judge(["causal_conv1d_fn"], [out.mT])
