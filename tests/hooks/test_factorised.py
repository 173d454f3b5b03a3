"""Factorised attention of videos: masks over all tokens of a clip, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.masked import masked, masked_mixer
from torch import Tensor
from torch.testing import assert_close

from foveate.adapt import as_core
from foveate.catalogue import tiers
from foveate.catalogue.contracts import Hook
from foveate.catalogue.registry import mixer
from foveate.models.blocks.factorised import Factorised

Sees = Callable[[int, int, int, int], bool]  # frame and place of a query, of a key


def hook(name: str, **options: Any) -> Hook:
    row = tiers.row(name)
    assert isinstance(row, tiers.HookRow)
    return row.make(**options)


def whole_clip(sees: Sees, frames: int, places: int) -> Tensor:
    at = [(t, n) for t in range(frames) for n in range(places)]
    return torch.tensor([[sees(*query, *key) for key in at] for query in at])


def run(found: Hook, over: str, heads: tuple[Tensor, ...]) -> Tensor:
    """Heads (B, H, T, N, D) through a hook's operator, as a batch of frames or of places."""
    axes = (0, 2, 1, 3, 4) if over == "space" else (0, 3, 1, 2, 4)
    placed = [one.permute(axes) for one in heads]
    assert placed[0].shape[:2].numel() == found.batch and placed[0].shape[2:] == (
        found.heads,
        found.length,
        found.head_dim,
    )
    out = as_core(found.operator, **found.options)(*(one.flatten(0, 1) for one in placed))
    return out.view(placed[0].shape).permute([axes.index(axis) for axis in range(5)])


def limb(joint: int) -> int:
    return joint // 3


CASES: list[tuple[Hook, str, int, int, Sees]] = [
    (
        hook("dsta_space", frames=3, batch=2),
        "space",
        3,
        16,
        lambda t, i, s, j: t == s and (limb(i) == limb(j) or 15 in (i, j)),
    ),
    (hook("dsta_time", frames=5, batch=2), "time", 5, 16, lambda t, i, s, j: i == j),
    (hook("g2v2former_space", frames=3, patches=7, batch=2), "space", 3, 7, lambda t, i, s, j: t == s),
    (hook("g2v2former_time", frames=5, patches=4, batch=2), "time", 5, 4, lambda t, i, s, j: i == j),
    (
        hook("g2v2former_time", frames=6, patches=3, batch=2, operator="window(1)"),
        "time",
        6,
        3,
        lambda t, i, s, j: i == j and abs(t - s) <= 1,
    ),
    (
        hook("g2v2former_time", frames=6, patches=3, batch=2, operator="streaming_llm", sinks=1, window=2),
        "time",
        6,
        3,
        lambda t, i, s, j: i == j and s <= t and (s == 0 or t - s < 2),
    ),
]


@pytest.mark.paper("DSTA", "definition")
@pytest.mark.paper("DSTA", "works_when")
@pytest.mark.paper("G2V2former", "definition")
@pytest.mark.paper("G2V2former", "works_when")
@pytest.mark.parametrize(("found", "over", "frames", "places", "sees"), CASES)
def test_each_is_a_mask_over_all_tokens_of_the_clip(
    found: Hook, over: str, frames: int, places: int, sees: Sees
) -> None:
    shape = (2, found.heads, frames, places, found.head_dim)
    heads = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, seen = run(found, over, heads), whole_clip(sees, frames, places)
    expected = masked(*(one.flatten(2, 3) for one in heads), seen).view(shape)
    assert_close(out, expected, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, heads, towards) for y in (out, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("DSTA", "works_when")
def test_joints_and_frames_are_joined_by_a_learned_mean() -> None:
    """Both over the same tokens (B, T, J, C), limbs alone in space; gradients reach all."""
    limbs, through = (mixer("flash_attention", 32, heads=8, causal=False).double() for _ in range(2))
    limbs.core = as_core(hook("dsta_space").operator)
    block, x = Factorised(limbs, through, in_turn=False).double(), torch.randn(2, 3, 16, 32, dtype=torch.float64)
    of_space = masked_mixer(limbs, x.flatten(1, 2), whole_clip(CASES[0][4], 3, 16))
    of_time = masked_mixer(through, x.flatten(1, 2), whole_clip(CASES[1][4], 3, 16))
    out = block(x)
    assert_close(out, ((of_space + of_time) / 2).view(x.shape), rtol=1e-9, atol=1e-9)
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())


@pytest.mark.paper("G2V2former", "works_when")
@pytest.mark.parametrize("name", ["flash_attention", "mswa", "gla", "mamba"])
def test_any_mixer_may_run_through_time(name: str) -> None:
    torch.manual_seed(0)
    frame, through = mixer("flash_attention", 16, heads=2, causal=False).double(), mixer(name, 16).double()
    block, x = Factorised(frame, through), torch.randn(2, 5, 3, 16, dtype=torch.float64)
    in_space = torch.stack([frame(x[:, t]) for t in range(5)], 1)
    expected = torch.stack([through(in_space[:, :, n]) for n in range(3)], 2)
    assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_tokens_of_no_video_are_refused() -> None:
    block = Factorised(torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(ValueError, match=r"takes tokens \(batch, frames, places, channels\); got \(2, 3, 4\)"):
        block(torch.zeros(2, 3, 4))
