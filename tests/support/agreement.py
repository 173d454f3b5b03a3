"""Equal values and equal gradients of a result and of its definition."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.testing import assert_close


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
