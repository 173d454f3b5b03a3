"""HoloCine: the model written out with dense masks, the work it saves, and what summaries of shots are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.masked import masked
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, mse_loss, silu

from foveate.counting import count_operations
from foveate.models.video import holocine

SIZES: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 2, "hidden": 32, "channels": 3, "text_dim": 10}
SHOTS, PROMPTS, SUMMARY = (2, 1, 3), (3, 2, 4, 1), 3
F, H, W = 6, 2, 3


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def norm(x: Tensor, module: Any = None) -> Tensor:
    affine = (None, None) if module is None else (module.weight, module.bias)
    return layer_norm(x, x.shape[-1:], *affine, eps=1e-6)


def of_shot(counts: tuple[int, ...], size: int) -> Tensor:
    return torch.tensor([shot for shot, count in enumerate(counts) for _ in range(count * size)])


def video_mask() -> Tensor:
    shot = of_shot(SHOTS, H * W)
    first = torch.tensor([int((shot[:at] == shot[at]).sum()) < SUMMARY for at in range(len(shot))])
    return (shot[:, None] == shot) | first


def text_mask() -> Tensor:
    shot, told = of_shot(SHOTS, H * W), of_shot(PROMPTS, 1) - 1
    return (told == -1) | (shot[:, None] == told)


def rotary(x: Tensor) -> Tensor:
    """Complex numbers turned by their place in time, height and width: 4 + 4 + 4 of 12 channels."""
    places = [(t, i, j) for t in range(F) for i in range(H) for j in range(W)]
    rates = [[place / 10_000 ** (c / 4) for place in at for c in (0, 2)] for at in places]
    turn = torch.polar(torch.ones(len(places), 6, dtype=torch.float64), torch.tensor(rates, dtype=torch.float64))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def attention(layer: Any, x: Tensor, context: Tensor, mask: Tensor, turned: bool) -> Tensor:
    q, k = rms(linear(layer.q, x), layer.norm_q.weight), rms(linear(layer.k, context), layer.norm_k.weight)
    q, k, v = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in (q, k, linear(layer.v, context)))
    q, k = (rotary(q), rotary(k)) if turned else (q, k)
    return linear(layer.o, masked(q, k, v, mask).transpose(1, 2).flatten(2))


def written_out(model: Any, video: Tensor, time: Tensor, text: Tensor) -> Tensor:
    cells = video.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6).flatten(4)
    patches = model.patch_embedding
    x = (cells @ patches.weight.flatten(1).T + patches.bias).flatten(1, 3)
    angles = time[:, None] / 10_000 ** (torch.arange(4, dtype=torch.float64) / 4)
    t = linear(
        model.time_embedding[2], silu(linear(model.time_embedding[0], torch.cat([angles.cos(), angles.sin()], 1)))
    )
    six = linear(model.time_projection[1], silu(t)).view(len(x), 6, -1)
    text = linear(model.text_embedding[2], gelu(linear(model.text_embedding[0], text), approximate="tanh"))
    for block in model.blocks:
        a, b, c, d, e, f = (block.modulation + six).unbind(1)
        y = norm(x) * (1 + b[:, None]) + a[:, None]
        x = x + c[:, None] * attention(block.self_attn, y, y, video_mask(), True)
        x = x + attention(block.cross_attn, norm(x, block.norm3), text, text_mask(), False)
        y = norm(x) * (1 + e[:, None]) + d[:, None]
        x = x + f[:, None] * linear(block.ffn[2], gelu(linear(block.ffn[0], y), approximate="tanh"))
    shift, scale = (model.head.modulation + t[:, None]).unbind(1)
    out = linear(model.head.head, norm(x) * (1 + scale[:, None]) + shift[:, None]).view(len(x), F, H, W, 2, 2, 3)
    rows = [[[out[:, f, i // 2, j // 2, i % 2, j % 2] for j in range(2 * W)] for i in range(2 * H)] for f in range(F)]
    return torch.stack([torch.stack([torch.stack(row, -1) for row in frame], -2) for frame in rows], 2)


@pytest.mark.paper("HoloCine", "definition")
@pytest.mark.paper("HoloCine", "works_when")
def test_shots_and_their_prompts_are_dense_masks() -> None:
    model = holocine(frequencies=8, summary=SUMMARY, **SIZES).double()
    video, time = torch.randn(2, 3, F, 2 * H, 2 * W, dtype=torch.float64), torch.tensor([3.0, 500.0]).double()
    text = torch.randn(2, sum(PROMPTS), 10, dtype=torch.float64)
    inputs = [one.requires_grad_() for one in (video, text)]
    follows(
        model,
        lambda: model(video, time, text, shots=SHOTS, prompts=PROMPTS),
        lambda: written_out(model, video, time, text),
        *inputs,
    )


@pytest.mark.paper("HoloCine", "works_when")
@torch.no_grad()
def test_only_visible_pairs_are_computed_and_work_is_nearly_linear_in_shots() -> None:
    model, counts = holocine(summary=2, **SIZES).double(), []
    for shots in (4, 8, 16):
        video, text = (
            torch.randn(1, 3, 2 * shots, 4, 8, dtype=torch.float64),
            torch.randn(1, 5 + 3 * shots, 10).double(),
        )
        with count_operations() as counted:
            model(video, text=text, shots=[2] * shots, prompts=[5] + [3] * shots)
        own, queries = 16, 16 * shots
        assert counted.pairs == 2 * 2 * queries * (own + 2 * (shots - 1) + 5 + 3)
        counts.append(counted.pairs)
    assert counts[1] < 2.6 * counts[0] and counts[2] < 2.9 * counts[1], "dense attention takes four times as much"


@pytest.mark.paper("HoloCine", "works_when")
def test_a_shot_learns_from_summaries_what_shots_apart_cannot_know() -> None:
    """The second shot is to have the brightness of the first, of which it sees nothing but noise itself."""

    def draw(batch: int) -> tuple[Tensor, Tensor]:
        bright = torch.randint(2, (batch, 1, 1, 1, 1)) * 2.0 - 1
        noise = torch.randn(batch, 1, 2, 4, 4)
        return torch.cat([noise[:, :, :1] * 0.1 + bright, noise[:, :, 1:]], 2), bright.expand(-1, 1, 1, 4, 4)

    found = []
    for summary in (2, 0):
        torch.manual_seed(3)
        sizes: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 2, "hidden": 48, "channels": 1, "text_dim": 4}
        model = holocine(frequencies=8, summary=summary, **sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            video, wanted = draw(16)
            loss = mse_loss(model(video, shots=[1, 1])[:, :, 1:], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            video, wanted = draw(64)
            found.append(mse_loss(model(video, shots=[1, 1])[:, :, 1:], wanted).item())
    assert found[0] < 0.2 and found[1] > 0.8, found  # 1 is what nothing known gives


def test_shots_and_prompts_that_do_not_add_up_are_refused() -> None:
    model, video, text = holocine(**SIZES), torch.randn(1, 3, 4, 4, 4), torch.randn(1, 6, 10)
    with pytest.raises(ValueError, match=r"frames of each shot, 4 in all; got \[2, 3\]"):
        model(video, shots=[2, 3])
    with pytest.raises(ValueError, match=r"each of 2 shots, 6 in all; got \[2, 4\]"):
        model(video, text=text, shots=[2, 2], prompts=[2, 4])
    with pytest.raises(ValueError, match="turned in pairs by each axis; got 10 channels"):
        holocine(**SIZES | {"dim": 20})
