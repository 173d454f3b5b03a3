"""StreamingLLM reads a prompt in pieces of any sizes, its rotary positions counted in the cache, as one whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.catalogue.registry import mixer

HEADS, GROUPS, WIDTH, BASE = 4, 2, 6, 20.0
LENGTH = 103  # memory is taken for a window, its sinks and 32 tokens: keys are dropped


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Channels c and c + D / 2 are a complex number, turned by its place."""
    half = x.shape[-1] // 2
    angles = places.double().unsqueeze(-1) * BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([number.real, number.imag], -1)


def formula(model: torch.nn.Module, x: Tensor, sinks: int, window: int) -> Tensor:
    """Token by token: the keys that a cache of sinks and a window holds, at positions counted in it."""
    batch, length, _ = x.shape
    q, k, v = (
        (x @ layer.weight.T).view(batch, length, heads, WIDTH).transpose(1, 2)
        for layer, heads in ((model.to_q, HEADS), (model.to_k, GROUPS), (model.to_v, GROUPS))
    )
    k, v = (each.repeat_interleave(HEADS // GROUPS, 1) for each in (k, v))
    rows = []
    for i in range(length):
        held = torch.tensor([j for j in range(i + 1) if j < sinks or i - j < window])
        at = torch.arange(len(held))
        logits = turned(q[:, :, i : i + 1], at[-1:]) @ turned(k[:, :, held], at).mT * WIDTH**-0.5
        rows.append(torch.softmax(logits, -1) @ v[:, :, held])
    return torch.cat(rows, 2).transpose(1, 2).flatten(2) @ model.to_out.weight.T


CUTS = (
    (LENGTH,),
    (2, LENGTH - 2),  # the sinks come in two pieces
    (1, 1, 5, LENGTH - 7),
    (9, 40, 2, 33, 1, LENGTH - 85),  # single tokens between, before keys are dropped and after
    (60, LENGTH - 60),
    (7,) * (LENGTH // 7) + (LENGTH % 7,),
    (70, 1, 1, 2, LENGTH - 74),
)


@pytest.mark.parametrize(("sinks", "window"), [(4, 5), (3, 1), (0, 6), (4, 2)])
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_whole(sinks: int, window: int) -> None:
    options = {"kv_heads": GROUPS, "head_dim": WIDTH, "sinks": sinks, "window": window, "rotary": BASE}
    model = mixer("streaming_llm", HEADS * WIDTH, heads=HEADS, **options).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, LENGTH, HEADS * WIDTH, dtype=torch.float64)
    expected = formula(model, x, sinks, window)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    for sizes in CUTS:
        outs, state = [], model.init_state(2)
        for piece in x.split(sizes, dim=1):
            out, state = model.prefill(piece, state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-9, atol=1e-9)
        kept = state.cache.positions().tolist()
        assert kept[:sinks] == list(range(sinks)), "the sinks stay"
        if max(sizes) <= 70:
            assert len(kept) < LENGTH, "nothing was dropped: the case shows less than it says"
