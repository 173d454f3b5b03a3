"""SEA: estimator, choice and mixture by dense maps, the memory that they take, and what distillation teaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

DIM, HEADS, WIDTH, CELLS = 24, 4, 6, 8


def model(*, random: bool = True, **options: object) -> torch.nn.Module:
    made = mixer("sea", DIM, heads=HEADS, cells=CELLS, positions=64, **options).double()
    if random:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def of_heads(made: torch.nn.Module, x: Tensor) -> list[Tensor]:
    layers = (made.to_q, made.to_k, made.to_v)
    return [(x @ layer.weight.T).unflatten(2, (-1, WIDTH)).transpose(1, 2) for layer in layers]


def normed(x: Tensor, layer: torch.nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def features(made: torch.nn.Module, x: Tensor, keys: bool, is_causal: bool) -> Tensor:
    x = x / WIDTH**0.25
    products = x @ made.projection.T
    if is_causal:
        return products.clamp_min(0) + 0.001
    exponent = products - 0.5 * (x * x).sum(-1, keepdim=True)
    top = exponent.flatten(2).max(2).values[..., None, None] if keys else exponent.max(3, keepdim=True).values
    return torch.exp(exponent - top.detach()) + 0.0001


def estimate(made: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Scores (B, H, N, K) and both factors (B, H, N, 2), Performer's map written out."""
    length = q.shape[2]
    weights = features(made, q, False, is_causal) @ features(made, k, True, is_causal).mT
    weights = weights * torch.ones(length, length).tril() if is_causal else weights
    if is_causal:
        codes = made.places[:length]
    else:
        codes = torch.zeros(length, WIDTH, dtype=q.dtype)
        for t in range(length):
            at = t * (WIDTH - 1) / (length - 1)
            low = min(int(at), WIDTH - 2)
            codes[t, low], codes[t, low + 1] = 1 - (at - low), at - low
    values = torch.cat([codes.expand(*v.shape[:2], -1, -1), v], 3)
    read = weights @ values / weights.sum(3, keepdim=True)
    hidden = torch.cat([read, v], 3) @ made.encode.weight.T + made.encode.bias
    hidden = torch.nn.functional.gelu(normed(hidden, made.norm))
    rows = hidden @ made.rows.weight.T + made.rows.bias  # (B, H, N, 2 * K / 4)
    channels = [rows[:, h, :, s * 2 : s * 2 + 2] for h in range(HEADS) for s in range(2)]
    x = normed(torch.stack(channels, 1), made.rows_norm)
    for layer in (made.first, made.second):
        x = conv2d(pad(x, (2, 2, 4, 0) if is_causal else (2, 2, 2, 2)), layer.weight, layer.bias, dilation=2).clamp_min(
            0
        )
    wide = torch.stack([x[..., c // 4] for c in range(CELLS)], -1)
    scores = torch.einsum("hc,bcnk->bhnk", made.last.weight[:, :, 0, 0], wide) + made.last.bias[None, :, None, None]
    return normed(scores, made.map_norm), torch.sigmoid(hidden @ made.to_scales.weight.T + made.to_scales.bias)


def chosen(scores: Tensor, keep: int, is_causal: bool) -> Tensor:
    """Which keys each query of one text reads, (H, N, N), from scores (H, N, K)."""
    length = scores.shape[1]
    shares, mask = scores.softmax(2), torch.zeros(HEADS, length, length, dtype=torch.bool)
    for t in range(length):
        seen = t + 1 if is_causal else length
        count = min(max(HEADS * round(keep * CELLS / seen), 1), HEADS * CELLS)
        ranked = sorted((-float(shares[h, t, c]), h, c) for h in range(HEADS) for c in range(CELLS))[:count]
        cells = {(h, c) for _, h, c in ranked}
        for h in range(HEADS):
            for j in range(seen):
                mask[h, t, j] = (h, j * CELLS // seen) in cells
    return mask


def heads_of(made: torch.nn.Module, x: Tensor, keep: int, is_causal: bool) -> Tensor:
    q, k, v = of_heads(made, x)
    length = x.shape[1]
    scores, scales = estimate(made, q, k, v, is_causal)
    mask = torch.stack([chosen(one.detach(), keep, is_causal) for one in scores])
    logits = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(~mask, float("-inf"))
    sparse = torch.where(mask.any(-1, keepdim=True), logits, 0.0).softmax(-1) * mask.any(-1, keepdim=True) @ v
    if is_causal:
        mean = torch.stack([v[:, :, : t + 1].mean(2) for t in range(length)], 2)
    else:
        share = torch.stack([scores.softmax(3).mean(2)[..., j * CELLS // length] for j in range(length)], -1)
        mean = ((share / share.sum(-1, keepdim=True))[..., None] * v).sum(2, keepdim=True)
    return scales[..., 1:] * scales[..., :1] * sparse + (1 - scales[..., 1:]) * mean


@pytest.mark.paper("SEA", "definition")
@pytest.mark.paper("SEA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("length", "keep", "random"), [(33, 4, True), (19, 2, True), (5, 3, True), (33, 4, False)])
def test_the_mixer_is_its_formula(is_causal: bool, length: int, keep: int, random: bool) -> None:
    made = model(keep=keep, causal=is_causal, random=random)
    x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
    expected = heads_of(made, x, keep, is_causal).transpose(1, 2).flatten(2) @ made.to_out.weight.T
    out = made(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves, towards = [x, *made.parameters()], torch.randn_like(out)
    got, wanted = (torch.autograd.grad(y, leaves, towards, allow_unused=True) for y in (out, expected))
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def kl(p: Tensor, logits: Tensor) -> Tensor:
    told = logits.softmax(-1)
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - told.clamp_min(1e-300).log()), 0.0).sum(-1).mean()


@pytest.mark.paper("SEA", "definition")
@pytest.mark.paper("SEA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_maps_and_outputs_are_distilled(is_causal: bool) -> None:
    made, x = model(keep=4, causal=is_causal), torch.randn(2, 21, DIM, dtype=torch.float64)
    teacher = mixer("flash_attention", DIM, heads=HEADS, causal=is_causal).double()
    hidden = ~torch.ones(21, 21).tril().bool() if is_causal else torch.zeros(21, 21).bool()
    q, k, v = of_heads(teacher, x)
    wanted = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(hidden, float("-inf")).softmax(-1)
    target = (wanted @ v).detach()
    q, k, v = of_heads(made, x)
    own = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(hidden, float("-inf"))
    scores = estimate(made, q, k, v, is_causal)[0]
    columns = [[min(j * CELLS // (t + 1 if is_causal else 21), CELLS - 1) for j in range(21)] for t in range(21)]
    stretched = torch.stack([scores[:, :, t, columns[t]] for t in range(21)], 2).masked_fill(hidden, float("-inf"))
    expected = (heads_of(made, x, 4, is_causal) - target).square().mean()
    for logits in (stretched, own):
        expected = expected + 0.1 * kl(wanted.detach(), logits) + (logits.softmax(-1) - wanted.detach()).square().mean()
    loss = made.distillation_loss(x, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    leaves = [p for name, p in made.named_parameters() if not name.startswith("to_out")]
    for one, other in zip(*(torch.autograd.grad(y, leaves) for y in (loss, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.paper("SEA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_distillation_teaches_which_keys_to_read_and_what_comes_of_them(is_causal: bool) -> None:
    """A teacher reads a marked quarter of the text, one of two; judged on other texts than were learned from."""
    torch.manual_seed(0)
    teacher = mixer("flash_attention", 16, heads=2, causal=is_causal)
    with torch.no_grad():
        teacher.to_q.weight.zero_()[::8, 1] = 3.0
        teacher.to_k.weight.zero_()[::8, 0] = 1.0
    made = mixer("sea", 16, heads=2, keep=12, cells=16, positions=64, causal=is_causal)
    made.load_state_dict(teacher.state_dict(), strict=False)

    def texts() -> Tensor:
        x, place, first = torch.randn(8, 48, 16), torch.arange(48), 12 * torch.randint(2, (8, 1))
        x[..., 0], x[..., 1] = 3.0 * ((place >= first) & (place < first + 12)), 1.0
        return x

    def judged(test: Tensor) -> tuple[float, float]:
        """Of the later half of the queries the teacher's weight on what is read, and the error of the heads."""
        with torch.no_grad():
            q, k, v = teacher.project(test, test)
            wanted = made.masked(q @ k.mT / math.sqrt(8)).softmax(-1)
            read = made.stretched(made.chosen(made.estimate(q, k, v).scores).float()) > 0
            error = (made.heads_out(q, k, v) - wanted @ v).square().mean()
            return float((wanted * read)[:, :, 24:].sum(-1).mean()), float(error)

    test = texts()
    before = judged(test)
    optimizer = torch.optim.Adam(
        [p for name, p in made.named_parameters() if name[:4] not in ("to_q", "to_k", "to_v")], 3e-3
    )
    for _ in range(70):
        optimizer.zero_grad()
        made.distillation_loss(texts(), teacher).backward()
        optimizer.step()
    after = judged(test)
    assert before[0] < 0.4 and after[0] > 0.5 and after[1] < 0.3 * before[1]


@pytest.mark.paper("SEA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_memory_and_work_are_linear_in_the_tokens(is_causal: bool) -> None:
    work, largest = {}, {}
    for length in (512, 1024, 2048):
        made = mixer("sea", 8, heads=2, keep=64, cells=32, positions=2048, causal=is_causal).eval()
        with torch.no_grad(), count_operations() as counted:
            made(torch.randn(1, length, 8))
        work[length], largest[length] = counted.flops + counted.elements, counted.largest
    # by two if linear, by four if quadratic
    assert work[2048] - work[1024] < 3.2 * (work[1024] - work[512])
    assert largest[2048] - largest[1024] < 3.2 * (largest[1024] - largest[512])
    made = mixer("sea", 8, heads=2, keep=8, cells=16, positions=8192, causal=is_causal).eval()
    with torch.no_grad(), count_operations() as counted:
        made(torch.randn(1, 8192, 8))
    assert counted.largest < 2**22 < 8192**2 / 8  # beyond keep · cells tokens, too


def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4; got 0, 64 and 8"):
        model(keep=0)
    with pytest.raises(ValueError, match="keys of their own"):
        model(kv_heads=2)
    with pytest.raises(ValueError, match="64 places, but there are 65 tokens"):
        model()(torch.randn(1, 65, DIM, dtype=torch.float64))
