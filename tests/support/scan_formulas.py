"""Convolutions and selective scans token by token, blocks by hand, and mixers to hold against them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.support.formulas import shaken
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.testing import assert_close

from foveate import Grid
from foveate.layers.short_conv import ShortConv
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba
from foveate.mixers.recurrent_ssm.mamba import Branch, Mamba, SelectiveScan

DIM = 12


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def convolved(conv: ShortConv, x: Tensor) -> Tensor:
    """Tap by tap: the last one reads the token itself."""
    length, taps = x.shape[1], conv.weight.squeeze(1)
    width = taps.shape[1]
    shifted = [torch.cat([torch.zeros_like(x[:, :age]), x[:, : length - age]], 1) for age in range(width)]
    return silu(conv.bias + sum(taps[:, width - 1 - age] * shifted[age] for age in range(width)))


def scanned(ssm: SelectiveScan, u: Tensor) -> Tensor:
    """S6, token by token."""
    low, write, read = ssm.to_choices(u).split([ssm.rank, *[ssm.A_log.shape[1]] * 2], -1)
    step = torch.log1p((ssm.to_step(low) + ssm.step_bias).exp())
    state, outs = torch.zeros(len(u), *ssm.A_log.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        fade = torch.exp(-step[:, t, :, None] * ssm.A_log.exp())
        state = fade * state + (step[:, t] * u[:, t]).unsqueeze(-1) * write[:, t, None, :]
        outs.append((state @ read[:, t, :, None]).squeeze(-1) + ssm.D * u[:, t])
    return torch.stack(outs, 1)


def passed(branch: nn.Module, u: Tensor) -> Tensor:
    """One pass of a branch, by hand."""
    assert isinstance(branch, Branch)
    return scanned(branch.ssm, convolved(branch.conv, u))


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def gated(mamba: Mamba, x: Tensor) -> Tensor:
    """A whole Mamba block, by hand."""
    u, gate = mamba.to_in(x).chunk(2, -1)
    return mamba.to_out(passed(mamba.branch, u) * silu(gate))


def both_ways(block: BidirectionalMamba, x: Tensor) -> Tensor:
    """A bidirectional block, by hand."""
    u, gate = block.to_in(x).chunk(2, -1)
    y = passed(block.passes[0], u) + passed(block.passes[1], u.flip(1)).flip(1)
    return block.to_out(y * silu(gate))


def along(index: Tensor, run: Any, u: Tensor) -> Tensor:
    """Run over tokens in an order, each answer put where its token lives."""
    return run(u[:, index])[:, index.argsort()]


def convolved_around(conv: Any, x: Tensor, grid: Grid) -> Tensor:
    """Each channel with the 3 nearest tokens along each axis, tap by tap; zeros lie outside."""
    image = x.mT.unflatten(2, grid.dims)
    out = torch.zeros_like(image) if conv.bias is None else conv.bias.view(-1, *(1 for _ in grid.dims)).expand_as(image)
    padded = nn.functional.pad(image, (1, 1) * grid.num_axes)
    for tap in itertools.product(range(3), repeat=grid.num_axes):
        where = tuple(slice(at, at + side) for at, side in zip(tap, grid.dims, strict=True))
        weight = conv.weight[(slice(None), 0, *tap)]
        out = out + padded[(slice(None), slice(None), *where)] * weight.view(-1, *(1 for _ in grid.dims))
    return out.flatten(2).mT


def agree(mixer: nn.Module, out: Tensor, expected: Tensor, x: Tensor) -> None:
    """Values, and gradients of the tokens and of all parameters."""
    assert_close(out, expected)
    towards, wanted = torch.randn_like(out), [x, *mixer.parameters()]
    mine, plain = (torch.autograd.grad((each * towards).sum(), wanted) for each in (out, expected))
    assert_close(mine, plain)
    assert all(bool((gradient != 0).any()) for gradient in mine)


def as_it_begins(module: nn.Module) -> Any:
    """In float64, with the parameters it starts with."""
    return module.double()


begun_and_shaken = pytest.mark.parametrize("begun", [as_it_begins, shaken])
