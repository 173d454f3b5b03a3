"""DMA: the formula with its choice written out, whole and decoded, and the pairs that it forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.dynamic_sparse.dma import attend_kept

HEADS, GROUPS, DIM = 4, 2, 24
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def model(keep: int) -> torch.nn.Module:
    return mixer("dma", DIM, heads=HEADS, kv_heads=GROUPS, keep=keep).double()


def randomised(dma: torch.nn.Module) -> torch.nn.Module:
    for parameter in dma.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return dma


def seen_by(gates: list[float], query: int, keep: int) -> list[int]:
    """Keys up to the query of the greatest gates, of equal ones the latest."""
    return sorted(range(query + 1), key=lambda j: (-gates[j], -j))[:keep]


def formula(dma: torch.nn.Module, x: Tensor, keep: int) -> Tensor:
    batch, length, _ = x.shape
    width = DIM // HEADS
    q = (x @ dma.to_q.weight.T).view(batch, length, HEADS, width)
    flat = x @ dma.to_v.weight.T
    keys, values = (x @ dma.to_k.weight.T).view(batch, length, GROUPS, width), flat.view(batch, length, GROUPS, width)
    gates = torch.exp(dma.a * torch.log1p(torch.exp(flat @ dma.to_step.weight.T)))
    rows = []
    for b in range(batch):
        for i in range(length):
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                seen = seen_by(gates[b, :, g].tolist(), i, keep)
                logits = keys[b, seen, g] @ q[b, i, h] / math.sqrt(width) + gates[b, seen, g]
                rows.append(torch.softmax(logits, 0) @ values[b, seen, g])
    return torch.stack(rows).view(batch, length, -1) @ dma.to_out.weight.T


@pytest.mark.paper("DMA", "definition")
@pytest.mark.paper("DMA", "works_when")
@pytest.mark.parametrize("keep", [1, 6, 19, 64])
@pytest.mark.parametrize("start", [True, False])
def test_the_mixer_is_its_formula_whole_and_decoded(keep: int, start: bool) -> None:
    dma = model(keep) if start else randomised(model(keep))
    if start:
        torch.testing.assert_close(dma.a, torch.zeros_like(dma.a))
    with torch.no_grad():
        dma.a.clamp_(-0.5, 0.5)  # beyond, biases of e^{a softplus} leave float64 few digits of their differences
    x = torch.randn(2, 41, DIM, dtype=torch.float64, requires_grad=True)
    expected, out = formula(dma, x, keep), dma(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves, towards = [x, *dma.parameters()], torch.randn_like(out)
    wanted, got = (torch.autograd.grad(y, leaves, towards) for y in (expected, out))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * max(1, float(other.abs().max())))
    with torch.no_grad():
        first, state = dma.prefill(x[:, :23], dma.init_state(2))
        outs = [first]
        for piece in x[:, 23:].split([1, 1, 11, 1, 4], 1):
            out, state = dma.prefill(piece, state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected.detach(), rtol=1e-9, atol=1e-9)
    assert state.k.shape[2] == min(keep, 41)


@pytest.mark.paper("DMA", "works_when")
def test_with_a_window_as_long_as_the_text_it_is_biased_attention() -> None:
    dma, x = randomised(model(37)), torch.randn(2, 37, DIM, dtype=torch.float64)
    q, k, v = (layer(x).view(2, 37, -1, DIM // HEADS).transpose(1, 2) for layer in (dma.to_q, dma.to_k, dma.to_v))
    bias = torch.exp(dma.a[:, None] * torch.nn.functional.softplus(dma.to_step(dma.to_v(x)).mT))
    k, v, bias = (y.repeat_interleave(2, 1) for y in (k, v, bias))
    logits = (q @ k.mT / math.sqrt(DIM // HEADS) + bias[:, :, None]).masked_fill(
        ~torch.ones(37, 37).tril().bool(), -1e300
    )
    expected = dma.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(dma(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("DMA", "works_when")
def test_gradients_of_queries_keys_values_and_biases_are_those_of_masked_dense_attention() -> None:
    for length, keep in ((57, 13), (57, 100)):
        q = torch.randn(1, 2, length, 5, dtype=torch.float64, requires_grad=True)
        k, v = (torch.randn(1, 1, length, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        gate = torch.rand(1, 1, length, dtype=torch.float64, requires_grad=True)
        mask = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            mask[i, seen_by(gate[0, 0].tolist(), i, keep)] = True
        logits = (q @ k.mT / math.sqrt(5) + gate[:, :, None]).masked_fill(~mask, float("-inf"))
        expected, out = logits.softmax(-1) @ v, attend_kept(q, k, v, gate, keep)
        towards = torch.randn_like(out)
        for one, other in zip(
            *(torch.autograd.grad(y, (q, k, v, gate), towards) for y in (out, expected)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("DMA", "works_when")
def test_work_is_linear_in_the_tokens_where_they_are_many() -> None:
    keep, counts = 64, {}
    for length in (512, 1024, 2048):
        q, gate = torch.randn(1, 1, length, 8), torch.rand(1, 1, length)
        with count_operations() as counted:
            attend_kept(q, q, q, gate, keep)
        assert counted.pairs == keep * (keep + 1) // 2 + keep * (length - keep)
        counts[length] = counted.computed + counted.elements
    assert counts[2048] - counts[1024] < 2.1 * (counts[1024] - counts[512])


@pytest.mark.paper("DMA", "works_when")
def test_it_was_measured_faster_than_dense_attention() -> None:
    cases = json.loads((RESULTS / "dynamic_text_cpu.json").read_text(encoding="utf-8"))["cases"]
    own = {(case["task"], case["tokens"]): case["seconds"] for case in cases if case["mechanism"] == "dma"}
    assert own["forward", 32768]["dense"] > 2.5 * own["forward", 32768]["sparse"]
    assert own["forward + backward", 16384]["dense"] > 1.3 * own["forward + backward", 16384]["sparse"]
    growth = {name: own["forward", 32768][name] / own["forward", 16384][name] for name in ("sparse", "dense")}
    assert growth["sparse"] < 2.5 and growth["dense"] > 3.5


def test_it_refuses_to_keep_nothing_and_a_state_of_another_batch() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        model(0)
    dma = model(5)
    with pytest.raises(ValueError, match="batch size 3; got tokens of 2"):
        dma.decode(torch.randn(2, 1, DIM, dtype=torch.float64), dma.init_state(3))
