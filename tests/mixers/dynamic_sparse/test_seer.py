"""SeerAttention: gate, target and sparse attention against dense maps, and a gate that learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.dynamic_sparse.seer import block_maxima

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
DIM, HEADS, GROUPS, WIDTH, BLOCK = 24, 4, 2, 6, 5


def model(*, random: bool = True, **options: object) -> torch.nn.Module:
    made = mixer("seer_attention", DIM, heads=HEADS, kv_heads=GROUPS, block=BLOCK, **options).double()
    if random:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def turned(x: Tensor, step: int = 1) -> Tensor:
    """Channels c and c + 3 of 6 rotated by 10000^(-c / 3) times the place."""
    angle = step * torch.arange(len(x), dtype=x.dtype)[:, None] * 10_000.0 ** (-torch.arange(3, dtype=x.dtype) / 3)
    first, second = x[:, :3], x[:, 3:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 1)


def of_heads(made: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Before positions, the keys' heads as often as they are read: (B, H, N, D) each."""
    pairs = ((made.to_q, 1), (made.to_k, HEADS // GROUPS), (made.to_v, HEADS // GROUPS))
    return [
        (x @ layer.weight.T).unflatten(2, (-1, WIDTH)).transpose(1, 2).repeat_interleave(times, 1)
        for layer, times in pairs
    ]


def shares(made: torch.nn.Module, q: Tensor, k: Tensor, head: int) -> Tensor:
    """The gate's softmax of one head, (blocks, blocks)."""
    starts = range(0, len(q), BLOCK)
    asked = torch.stack([q[s : s + BLOCK].mean(0) for s in starts]) @ made.gate_q[head]
    blocks = [k[s : s + BLOCK] for s in starts]
    pooled = torch.stack([torch.cat([b.max(0).values, b.min(0).values, b.mean(0)]) for b in blocks])
    told = pooled @ made.gate_k[head // (HEADS // GROUPS)]
    logits = turned(asked, BLOCK) @ turned(told, BLOCK).T / math.sqrt(asked.shape[1])
    return logits.masked_fill(~torch.ones(len(starts), len(starts)).tril().bool(), float("-inf")).softmax(1)


def map_of(q: Tensor, k: Tensor) -> Tensor:
    logits = turned(q) @ turned(k).T / math.sqrt(WIDTH)
    return logits.masked_fill(~torch.ones(len(q), len(q)).tril().bool(), float("-inf")).softmax(1)


def maxima(weights: Tensor) -> Tensor:
    starts = range(0, len(weights), BLOCK)
    return torch.stack([torch.stack([weights[r : r + BLOCK, c : c + BLOCK].max() for c in starts]) for r in starts])


def formula(made: torch.nn.Module, x: Tensor, k: int, threshold: float | None) -> Tensor:
    outs = []
    for qkv in zip(*of_heads(made, x), strict=True):
        heads = []
        for head, (q, keys, v) in enumerate(zip(*qkv, strict=True)):
            share = shares(made, q, keys, head).tolist()
            mask = torch.zeros(len(q), len(q), dtype=torch.bool)
            for row, values in enumerate(share):
                ranked = sorted(range(row), key=lambda c: -values[c])[: k - 1]
                if threshold is not None:
                    ranked = [c for c in range(row) if values[c] >= threshold]
                for column in [row, *ranked]:
                    mask[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = True
            logits = turned(q) @ turned(keys).T / math.sqrt(WIDTH)
            heads.append(logits.masked_fill(~mask.tril(), float("-inf")).softmax(1) @ v)
        outs.append(torch.cat(heads, 1))
    return torch.stack(outs) @ made.to_out.weight.T


@pytest.mark.paper("SeerAttention", "definition")
@pytest.mark.paper("SeerAttention", "works_when")
@pytest.mark.parametrize(
    ("k", "threshold", "random"), [(1, None, True), (3, None, True), (3, None, False), (9, None, True), (4, 0.2, True)]
)
def test_the_mixer_is_masked_dense_attention_on_what_its_gate_chose(
    k: int, threshold: float | None, random: bool
) -> None:
    made = model(k=k, threshold=threshold, random=random)
    x = torch.randn(2, 43, DIM, dtype=torch.float64, requires_grad=True)
    expected, out = formula(made, x, k, threshold), made(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves, towards = (
        [x, made.to_q.weight, made.to_k.weight, made.to_v.weight, made.to_out.weight],
        torch.randn_like(out),
    )
    for one, other in zip(*(torch.autograd.grad(y, leaves, towards) for y in (out, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("SeerAttention", "works_when")
@pytest.mark.parametrize("length", [40, 43, 3])
def test_block_maxima_are_those_of_the_dense_map(length: int) -> None:
    q, k = torch.randn(2, 4, length, WIDTH, dtype=torch.float64), torch.randn(2, 2, length, WIDTH, dtype=torch.float64)
    found = block_maxima(q, k, BLOCK)
    logits = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(WIDTH)).masked_fill(
        ~torch.ones(length, length).tril().bool(), float("-inf")
    )
    for b, h in ((0, 0), (1, 3)):
        torch.testing.assert_close(found[b, h], maxima(logits.softmax(-1)[b, h]), rtol=1e-9, atol=1e-12)


@pytest.mark.paper("SeerAttention", "works_when")
def test_block_maxima_take_memory_linear_in_the_tokens() -> None:
    largest = {}
    for length in (512, 1024, 2048):
        q = torch.randn(1, 2, length, 8)
        with count_operations() as counted:
            block_maxima(q, q, 32)
        largest[length] = counted.largest
    assert largest == {length: 2 * 32 * length for length in largest}


@pytest.mark.paper("SeerAttention", "definition")
@pytest.mark.paper("SeerAttention", "works_when")
def test_the_gate_learns_by_its_divergence_from_the_maxima() -> None:
    made, x = model(), torch.randn(2, 43, DIM, dtype=torch.float64)
    q, k, _ = of_heads(made, x)
    losses = []
    for b in range(2):
        for head in range(HEADS):
            target = maxima(map_of(q[b, head], k[b, head])).detach()
            target, told = (
                target / target.sum(1, keepdim=True),
                shares(made, q[b, head].detach(), k[b, head].detach(), head),
            )
            for row in range(9 // 4, 9):
                losses.append(sum(t * (t / p).log() for t, p in zip(target[row], told[row], strict=True) if t > 0))
    expected, loss = sum(losses) / len(losses), made.gate_loss(x)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    gate = [made.gate_q, made.gate_k]
    for one, other in zip(*(torch.autograd.grad(y, gate) for y in (loss, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    made.gate_loss(x).backward()
    assert all((parameter.grad is not None) == name.startswith("gate") for name, parameter in made.named_parameters())


@pytest.mark.paper("SeerAttention", "works_when")
def test_a_trained_gate_finds_the_blocks_that_matter() -> None:
    """On texts that it was not trained on, by the maxima that its choice holds of those of the best choice."""
    torch.manual_seed(0)
    made = mixer("seer_attention", 32, heads=4, block=8, k=4)
    with torch.no_grad():
        for layer in (made.to_q, made.to_k):
            layer.weight *= 4  # maps that are not even

    def texts() -> Tensor:
        """Of blocks alike, as sentences have a topic."""
        return torch.randn(4, 16, 1, 32).expand(-1, -1, 8, -1).flatten(1, 2) + 0.5 * torch.randn(4, 128, 32)

    def recall() -> float:
        q, k, _ = made.heads_of(test, test)
        weight = block_maxima(*made.turned(q, k), 8)[:, :, 5:]
        best = weight.topk(4, dim=3).values.sum()
        return float((weight * made.chosen(q, k)[:, :, 5:]).sum() / best)

    test = texts()
    with torch.no_grad():
        before, first = recall(), float(made.gate_loss(test))
    optimizer = torch.optim.Adam([made.gate_q, made.gate_k], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        made.gate_loss(texts()).backward()
        optimizer.step()
    with torch.no_grad():
        after, last = recall(), float(made.gate_loss(test))
    assert last < 0.7 * first and 1 - after < 0.5 * (1 - before)


@pytest.mark.paper("SeerAttention", "works_when")
def test_it_was_measured_faster_than_dense_attention_with_its_gate() -> None:
    cases = json.loads((RESULTS / "dynamic_text_cpu.json").read_text(encoding="utf-8"))["cases"]
    own = {(case["task"], case["tokens"]): case["seconds"] for case in cases if case["mechanism"] == "seer_attention"}
    for task, tokens in (("forward", 16384), ("forward", 32768), ("forward + backward", 16384)):
        assert own[task, tokens]["dense"] > 2 * own[task, tokens]["sparse"]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5, 0 and None"):
        model(k=0)
    with pytest.raises(ValueError, match="threshold from 0 to 1"):
        model(k=2, threshold=1.5)
