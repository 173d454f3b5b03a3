"""Products with weights, by whichever of torch's two CPU libraries is the faster one on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

VARIABLE = "FOVEATE_PRODUCTS"
SMALL = 2**21  # multiplications, below which the call costs more than a faster library saves
_ENOUGH = 0.9  # of the time that F.linear takes
_REPEATS = 5
_PLAIN = (Tensor, nn.Parameter)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, on CPUs and in float32 by the faster of torch's two libraries.

    torch gives float32 products to MKL. Its oneDNN is twice as fast on some processors and slower on others: a
    measurement of a few milliseconds decides, once a process. ``FOVEATE_PRODUCTS=torch`` or ``onednn`` decides
    without one. Other devices and dtypes, autocast, small products, weights that are not contiguous, what
    `torch.compile` traces, and transforms such as `torch.func.vmap` are left to F.linear.

    >>> x, weight = torch.randn(2, 300, 128), torch.randn(64, 128)
    >>> torch.testing.assert_close(linear(x, weight), x @ weight.T, atol=1e-4, rtol=1e-4)
    """
    if torch.compiler.is_compiling() or not _fits(x, weight, bias) or faster() != "onednn":
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _onednn(x, weight, bias)


@cache
def faster() -> str:
    """The library for large products of float32 on this machine: "torch", as F.linear has it, or "onednn"."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "torch", "onednn"):
        raise ValueError(f"{VARIABLE}={asked}: possible are torch, onednn, or nothing for the faster of them")
    if asked == "torch" or not _has_onednn():
        return "torch"
    return asked or _measured()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.no_grad()
def _measured() -> str:
    x, weight = (torch.ones(rows, 512, dtype=torch.float32, device="cpu") for rows in (256, 512))
    best: dict[Callable[..., Tensor], float] = {F.linear: float("inf"), _onednn: float("inf")}
    for _ in range(_REPEATS):
        for product in best:
            best[product] = min(best[product], _seconds(product, x, weight))
    return "onednn" if best[_onednn] < _ENOUGH * best[F.linear] else "torch"


def _seconds(product: Callable[..., Tensor], x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    product(x, weight, None)
    return time.perf_counter() - start


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.numel() * weight.shape[0] >= SMALL
        and weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and _plain(x)
        and _plain(weight)
        and weight.is_contiguous()
        and (bias is None or (_plain(bias) and bias.shape == weight.shape[:1]))
        and not _watched()
    )


def _plain(x: Tensor) -> bool:
    return type(x) in _PLAIN and x.dtype is torch.float32 and x.device.type == "cpu" and x.layout is torch.strided


def _watched() -> bool:
    """Whether somebody relies on which of torch's operations are called, or forbids these."""
    return (
        torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.enabled
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, for gradients: differentiable wherever a graph is asked for."""
    if torch.is_grad_enabled() or a.numel() * b.shape[1] < SMALL or not (_plain(a) and _plain(b)) or _watched():
        return a @ b
    return _onednn(a, b.t(), None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = None if weight is None else _product(rows, weight).view(*grad.shape[:-1], -1)
        d_weight = None if x is None else _product(rows.t(), x.reshape(-1, x.shape[-1]))
        return dx, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the place of nn.Linear's own method, under its name, as copied and pickled modules ask for it."""
    return linear(x, layer.weight, layer.bias)


def takes(module: nn.Module) -> bool:
    """Whether a module is a linear map and nothing else, with weights that the faster library takes."""
    if type(module) is not nn.Linear or hasattr(module, "_hf_hook"):
        return False
    another = vars(module).get("forward")
    return _plain(module.weight) and getattr(another, "__func__", another) in (None, forward)
