"""EMA-Sink: the cache as an explicit loop over frames, the mixer around it, and the student it makes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor, nn

from foveate.cache.ema_sink import EMASinkCache
from foveate.catalogue.registry import mixer
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.recipes.reward_forcing import reward_forcing
from foveate.recipes.small_lm import SmallLM

DIM, HEADS, GROUPS, WIDTH, WINDOW, BLOCK, ALPHA = 12, 2, 1, 6, 3, 2, 0.7


def turned(x: Tensor, at: list[int], base: float | None) -> Tensor:
    """Rows of x (n, D) turned to their places."""
    if base is None:
        return x
    angles = torch.tensor(at, dtype=x.dtype).unsqueeze(1) * base ** (-2 * torch.arange(WIDTH // 2).double() / WIDTH)
    made = torch.complex(x[:, : WIDTH // 2], x[:, WIDTH // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([made.real, made.imag], -1)


def formula(layer: nn.Module, x: Tensor, base: float | None = None) -> Tensor:
    """Frame by frame, with lists of frames: sinks, and those in the window."""
    outs = []
    for b in range(len(x)):
        q, k, v = (x[b] @ w.weight.T for w in (layer.to_q, layer.to_k, layer.to_v))
        sink_k = sink_v = None
        frames: list[tuple[Tensor, Tensor]] = []
        rows = []
        for first in range(0, x.shape[1], BLOCK):
            own = (k[first : first + BLOCK], v[first : first + BLOCK])
            if sink_k is None:
                sink_k, sink_v = own
            else:
                frames.append(own)
                if len(frames) > WINDOW:
                    old_k, old_v = frames.pop(0)
                    sink_k = ALPHA * sink_k + (1 - ALPHA) * old_k
                    sink_v = ALPHA * sink_v + (1 - ALPHA) * old_v
            keys = torch.cat([sink_k, *(frame for frame, _ in frames)])
            values = torch.cat([sink_v, *(frame for _, frame in frames)])
            places = list(range(len(keys)))
            turned_keys = turned(keys, places, base)
            heads = []
            for h in range(HEADS):
                queries = turned(q[first : first + BLOCK, h * WIDTH : (h + 1) * WIDTH], places[-BLOCK:], base)
                heads.append((queries @ turned_keys.T / math.sqrt(WIDTH)).softmax(-1) @ values)
            rows.append(torch.cat(heads, -1))
        outs.append(torch.cat(rows) @ layer.to_out.weight.T)
    return torch.stack(outs)


def made(**options: object) -> nn.Module:
    sizes = {"window": WINDOW, "block": BLOCK, "alpha": ALPHA}
    return mixer("ema_sink_attention", DIM, heads=HEADS, kv_heads=GROUPS, **sizes, **options).double()


@pytest.mark.paper("Reward Forcing (EMA-Sink)", "definition")
@pytest.mark.paper("Reward Forcing (EMA-Sink)", "works_when")
@pytest.mark.parametrize("base", [None, 100.0])
def test_it_is_the_explicit_loop(base: float | None) -> None:
    layer = made(rotary=base)
    x = torch.randn(2, 9 * BLOCK, DIM, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, base), x)


@pytest.mark.paper("Reward Forcing (EMA-Sink)", "works_when")
def test_memory_is_constant_and_streaming_equals_the_whole() -> None:
    layer, x = made(rotary=100.0), torch.randn(1, 40 * BLOCK, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = formula(layer, x, 100.0)
        state, outs, sizes = layer.init_state(1), [], []
        for frame in x.split(BLOCK, dim=1):
            out, state = layer.prefill(frame, state)
            outs.append(out)
            sizes.append(state.nbytes)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-10)
    frame_bytes = 2 * BLOCK * GROUPS * WIDTH * 8
    assert sizes == [min(n, 1 + WINDOW) * frame_bytes for n in range(1, 41)]
    assert state.seen == 40 * BLOCK


@pytest.mark.paper("Reward Forcing (EMA-Sink)", "works_when")
def test_what_left_long_ago_still_counts_by_its_powers() -> None:
    """Values of frame m are in the slots with α^(n - m) (1 - α), and those of the first frame with α^n."""
    cache = EMASinkCache(window=WINDOW, block=BLOCK, alpha=ALPHA)
    frames = torch.randn(12, 1, 1, BLOCK, 3, dtype=torch.float64)
    for frame in frames:
        cache = cache.append(2 * frame, frame)
    evicted = 12 - 1 - WINDOW
    weights = [ALPHA**evicted] + [(1 - ALPHA) * ALPHA ** (evicted - m) for m in range(1, evicted + 1)]
    slots = sum(w * frame for w, frame in zip(weights, frames, strict=False))
    torch.testing.assert_close(cache.v[:, :, :BLOCK], slots)
    torch.testing.assert_close(cache.k[:, :, :BLOCK], 2 * slots)
    torch.testing.assert_close(cache.v[:, :, BLOCK:], torch.cat(list(frames[-WINDOW:]), 2))
    assert mixer("ema_sink_attention", 8, heads=2).empty.alpha == 0.999  # the published one


def distance(student: nn.Module, teacher: nn.Module, steps: int) -> float:
    """How far the student is from its teacher on fresh videos, after so many steps of the recipe's stage."""
    (stage,) = reward_forcing().stages
    optimizer = torch.optim.Adam(student.parameters(), lr=stage.lr)
    for _ in range(steps):
        optimizer.zero_grad()
        stage.loss(student, teacher, torch.randint(16, (4, 24))).backward()
        optimizer.step()
    with torch.no_grad():
        return float(stage.loss(student, teacher, torch.randint(16, (32, 24))))


def test_the_student_is_nearer_to_its_teacher_than_one_from_scratch() -> None:
    teacher = SmallLM(partial(FlashAttention, heads=4, causal=False))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    recipe = reward_forcing(window=2, block=4, alpha=0.9)
    scratch = recipe.prepare(SmallLM(partial(FlashAttention, heads=4, causal=False)))
    assert distance(recipe.prepare(teacher), teacher, 10) < 0.3 * distance(scratch, teacher, 10)


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="whole ones"):
        made()(torch.randn(1, 2 * BLOCK + 1, DIM, dtype=torch.float64))
    with pytest.raises(ValueError, match="blocks of 2"):
        EMASinkCache(window=2, block=2).append(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    with pytest.raises(ValueError, match="alpha is a share"):
        EMASinkCache(window=2, alpha=1.5)
