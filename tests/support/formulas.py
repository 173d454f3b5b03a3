"""A module and the formula of its paper: equal values and gradients, as the module starts and at random parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close


def follows(
    module: nn.Module,
    call: Callable[[], Tensor],
    formula: Callable[[], Tensor],
    *inputs: Tensor,
    rtol: float = 1e-7,
    atol: float = 1e-7,
) -> None:
    """AssertionError where ``call()`` and ``formula()`` differ, or their gradients by an input or a parameter.

    ``module`` is in float64; it is tried with the parameters it has, and again after each was moved at random.
    """
    for move in (0.0, 0.1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(move * torch.randn_like(parameter))
        wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
        found, expected = call(), formula()
        assert_close(found, expected, rtol=rtol, atol=atol)
        towards = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(out, wanted, towards, allow_unused=True) for out in (found, expected))
        for x, mine, other in zip(wanted, ours, theirs, strict=True):
            pair = (torch.zeros_like(x) if gradient is None else gradient for gradient in (mine, other))
            assert_close(*pair, rtol=10 * rtol, atol=10 * atol)


def shaken(module: nn.Module) -> Any:
    """In float64, with no parameter at a special value."""
    module.double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def agree(got: Tensor, expected: Tensor, x: Tensor, module: nn.Module, rtol: float = 1e-7, atol: float = 1e-8) -> None:
    """Both are functions of x and of the module's parameters."""
    assert_close(got, expected, rtol=rtol, atol=atol)
    towards = torch.randn_like(expected)
    wanted = (x, *module.parameters())
    ours, theirs = (torch.autograd.grad(y, wanted, towards, allow_unused=True) for y in (got, expected))
    for (name, parameter), mine, other in zip([("x", x), *module.named_parameters()], ours, theirs, strict=True):
        none = torch.zeros_like(parameter)
        mine, other = (none if y is None else y for y in (mine, other))
        assert_close(mine, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"gradient of {name}: {text}")
