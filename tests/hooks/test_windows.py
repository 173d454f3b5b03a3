"""Applications of window attention: each against windows cut by hand, one after the other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from foveate.adapt import as_core
from foveate.catalogue import tiers
from foveate.catalogue.contracts import Hook


def hook(name: str, **sizes: object) -> Hook:
    row = tiers.row(name)
    assert isinstance(row, tiers.HookRow)
    return row.make(**sizes)


def edges(length: int, size: int, shift: int) -> list[tuple[int, int]]:
    """Windows of ``size`` along an axis: the first ends at ``shift`` if there is one, the last where the axis does."""
    cuts = [0, *range(shift or size, length, size), length]
    return list(itertools.pairwise(cuts))


def in_windows(
    q: Tensor, k: Tensor, v: Tensor, dims: tuple[int, ...], size: tuple[int, ...], shift: tuple[int, ...]
) -> Tensor:
    """Softmax attention (B, H, N, D) inside each box, one box after the other."""
    grid = torch.arange(math.prod(dims)).view(dims)
    out = torch.zeros_like(q)
    for box in itertools.product(*map(edges, dims, size, shift)):
        inside = grid[tuple(slice(*edge) for edge in box)].flatten()
        logits = q[:, :, inside] @ k[:, :, inside].mT / math.sqrt(q.shape[-1])
        out[:, :, inside] = logits.softmax(-1) @ v[:, :, inside]
    return out


def compare(found: Hook, dims: tuple[int, ...], size: tuple[int, ...], shift: tuple[int, ...]) -> None:
    """Values and gradients of the hook's operator are those of the windows."""
    core = as_core(found.operator, **found.options)
    q, k, v = (torch.randn(2, 2, math.prod(dims), 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    outs = core(q, k, v, layout=found.layout), in_windows(q, k, v, dims, size, shift)
    torch.testing.assert_close(*outs)
    towards = torch.randn_like(outs[0])
    for one, other in zip(*(torch.autograd.grad(out, (q, k, v), towards) for out in outs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.paper("SeedVR2", "definition")
@pytest.mark.paper("SeedVR2", "works_when")
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dims", [(5, 31, 25), (3, 28, 40), (1, 12, 12)])
def test_seedvr2_cuts_each_video_by_its_own_size(dims: tuple[int, int, int], shifted: bool) -> None:
    scale = (45 * 80 / (dims[1] * dims[2])) ** 0.5
    size = (
        math.ceil(min(dims[0], 30) / 4),
        math.ceil(round(dims[1] * scale) / 3),
        math.ceil(round(dims[2] * scale) / 3),
    )
    shift = tuple(side // 2 if shifted and side < length else 0 for side, length in zip(size, dims, strict=True))
    compare(hook("seedvr2", frames=dims[0], height=dims[1], width=dims[2], shifted=shifted), dims, size, shift)


@pytest.mark.paper("SeedVR2", "works_when")
@pytest.mark.parametrize("dims", [(30, 45, 80), (30, 90, 160), (21, 64, 64), (9, 33, 119)])
def test_seedvr2s_windows_tile_grids_of_any_size_evenly(dims: tuple[int, int, int]) -> None:
    """Each window has as many tokens as one of nine at 720p, and the shape of the grid."""
    from foveate.hooks.windows import seedvr2_window

    time, high, wide = seedvr2_window(*dims)
    assert time == math.ceil(min(dims[0], 30) / 4)
    assert 15 * 27 * 0.85 < high * wide < 15 * 27 * 1.15
    assert 0.85 < (high / wide) / (dims[1] / dims[2]) < 1.15


@pytest.mark.paper("Audio-MAE", "definition")
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dims", [(10, 6), (16, 8), (7, 3)])
def test_audio_mae_shifts_its_windows_along_time_alone(dims: tuple[int, int], shifted: bool) -> None:
    compare(hook("audio_mae_decoder", time=dims[0], frequency=dims[1], shifted=shifted), dims, (4, 4), (2 * shifted, 0))


@pytest.mark.paper("Audio-MAE", "works_when")
def test_audio_mae_attends_over_tokens_put_back_in_their_places() -> None:
    """Tokens that the encoder saw come first, mask tokens after them; the decoder puts all back, and attends."""
    from foveate import attend

    found = hook("audio_mae_decoder", time=10, frequency=6, shifted=True)
    order = torch.randperm(60)
    restore = order.argsort()
    kept = torch.randn(2, 2, 60, 6, dtype=torch.float64)[:, :, order[:12]]  # what the encoder sees
    encoded = attend(kept, kept, kept)
    torch.testing.assert_close(encoded, (kept @ kept.mT / math.sqrt(6)).softmax(-1) @ kept)
    mask_token = torch.randn(3, 1, 1, 1, 6, dtype=torch.float64)
    shuffled = torch.cat([encoded.expand(3, -1, -1, -1, -1), mask_token.expand(-1, 2, 2, 48, -1)], 3)
    shuffled = shuffled * torch.tensor([1.0, 0.7, -0.5], dtype=torch.float64).view(3, 1, 1, 1, 1)
    q, k, v = (x[:, :, restore] for x in shuffled)
    out = as_core(found.operator)(q, k, v, layout=found.layout)[:, :, order]
    grid = torch.arange(60).view(10, 6)
    window = torch.zeros(60, dtype=torch.long)
    for number, box in enumerate(itertools.product(edges(10, 4, 2), edges(6, 4, 0))):
        window[grid[tuple(slice(*edge) for edge in box)]] = number
    same = window[order][:, None] == window[order]
    logits = (shuffled[0] @ shuffled[1].mT / math.sqrt(6)).masked_fill(~same, float("-inf"))
    torch.testing.assert_close(out, logits.softmax(-1) @ shuffled[2])


@pytest.mark.paper("HBFormer", "definition")
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dims", [(9, 8), (14, 21), (5, 30)])
def test_hbformers_windows_are_cut_by_hand(dims: tuple[int, int], shifted: bool) -> None:
    shift = 3 if shifted else 0
    compare(hook("hbformer", height=dims[0], width=dims[1], shifted=shifted), dims, (7, 7), (shift, shift))


@pytest.mark.paper("HBFormer", "works_when")
def test_hbformers_attention_is_that_of_transformers_swin() -> None:
    """The shifted layer of Swin, mask and all, with its table of biases at zero."""
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    config = SwinConfig(window_size=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    layer = SwinLayer(config, dim=12, input_resolution=(14, 21), num_heads=2, shift_size=3).double().eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.zero_()
    x = torch.randn(2, 14 * 21, 12, dtype=torch.float64)
    attention = layer.attention
    with torch.no_grad():
        normed = layer.layernorm_before(x)
        inner = getattr(attention, "self", attention)
        names = ("query", "key", "value") if hasattr(inner, "query") else ("q_proj", "k_proj", "v_proj")
        q, k, v = (getattr(inner, name)(normed).unflatten(-1, (2, 6)).transpose(1, 2) for name in names)
        found = hook("hbformer", height=14, width=21)
        out = as_core(found.operator)(q, k, v, layout=found.layout).transpose(1, 2).flatten(2)
        projected = attention.output(out, x) if hasattr(attention, "output") else attention.o_proj(out)
        middle = x + projected
        mlp = (
            layer.output(layer.intermediate(layer.layernorm_after(middle)))
            if hasattr(layer, "intermediate")
            else layer.mlp(layer.layernorm_after(middle))
        )
        want = layer(x, (14, 21))
    torch.testing.assert_close(middle + mlp, want[0] if isinstance(want, tuple) else want)
