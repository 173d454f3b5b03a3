"""Packed keys and values against quantisation and attention written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate.cache.memory import Look
from foveate.cache.packed import PackedTokens
from foveate.cache.zipped import Precision, ZipMemory, probe_rows

GAP, D, DV = 12, 6, 5


def quantised(k: Tensor, v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Keys (S, D) rounded channel by channel; values (S, Dv) divided by their channels' norms, token by token."""
    levels = 2**bits - 1
    k_out, v_out = k.clone(), v.clone()
    for c in range(k.shape[1]):
        low, step = k[:, c].min(), (k[:, c].max() - k[:, c].min()) / levels
        k_out[:, c] = torch.round((k[:, c] - low) / step) * step + low
    norm = torch.stack([v[:, c].abs().max() ** 0.5 for c in range(v.shape[1])])
    for t in range(v.shape[0]):
        even = v[t] / norm
        low, step = even.min(), (even.max() - even.min()) / levels
        v_out[t] = (torch.round((even - low) / step) * step + low) * norm
    return k_out, v_out


@pytest.mark.paper("ZipCache", "definition")
@pytest.mark.parametrize("bits", [2, 4])
def test_quantised_tokens_are_those_of_the_formula(bits: int) -> None:
    k, v = torch.randn(2, 3, 17, D, dtype=torch.float64), torch.randn(2, 3, 17, DV, dtype=torch.float64)
    position = torch.arange(17).expand(2, 3, 17).clone()
    position[1, :, 14:] = -1
    got_k, got_v = PackedTokens.of(k, v, position, bits).dequantised()
    for entry, count in ((0, 17), (1, 14)):
        for head in range(3):
            want_k, want_v = quantised(k[entry, head, :count], v[entry, head, :count], bits)
            torch.testing.assert_close(got_k[entry, head, :count], want_k)
            torch.testing.assert_close(got_v[entry, head, :count], want_v)


def test_a_channel_or_a_token_without_spread_is_exact() -> None:
    k = torch.full((1, 1, 4, 3), 2.5)
    got_k, got_v = PackedTokens.of(k, torch.zeros(1, 1, 4, 3), torch.arange(4).expand(1, 1, 4), 2).dequantised()
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, torch.zeros_like(k))


def softmax_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def saliency(q: Tensor, k: Tensor, probes: list[int], new: range) -> list[float]:
    """Of the new tokens, for one key head: q (2, n, D) by position; k (n, D) as the cache holds the older ones."""
    total, seeing = [0.0] * len(new), [0] * len(new)
    for i in probes:
        weights = (q[:, i] @ k[: i + 1].mT * 0.3).softmax(-1).mean(0)
        for number, j in enumerate(new):
            if j <= i:
                total[number] += float(weights[j])
                seeing[number] += 1
    return [a / max(b, 1) for a, b in zip(total, seeing, strict=True)]


@pytest.mark.paper("ZipCache", "definition")
@pytest.mark.paper("ZipCache", "works_when")
@pytest.mark.parametrize("probes", [1.0, 0.1])
def test_attention_over_the_packed_cache_is_that_over_the_dequantised_one(probes: float) -> None:
    """A prompt of 29 is packed as a whole, then 12 tokens at a time: the salient in 4 bits, the others in 2."""
    length = 29 + 2 * GAP + 5
    q = torch.randn(4, length, D, dtype=torch.float64)
    k, v = torch.randn(2, length, D, dtype=torch.float64), torch.randn(2, length, DV, dtype=torch.float64)
    memory = ZipMemory(Precision(0.6, 4, 2, GAP, probes))
    held_k, held_v = k.clone(), v.clone()
    at = 0
    with torch.no_grad():
        for count in [29] + [1] * (2 * GAP + 5):
            place = torch.arange(at, at + count)[None]
            part = slice(at, at + count)
            out = memory.attend(
                q[None, :, part], k[None, :, part], v[None, :, part], Look(place, {"scale": 0.3}, padded=False)
            )
            for h in range(4):
                for i in range(at, at + count):
                    want = softmax_over(q[h, i : i + 1], held_k[h // 2, : i + 1], held_v[h // 2, : i + 1])
                    torch.testing.assert_close(out[0, h, i - at : i - at + 1], want)
            at += count
            if at == 29 or (at - 29) % GAP == 0:
                new = range(0, 29) if at == 29 else range(at - GAP, at)
                rows, unused = probe_rows(torch.arange(new.start, at)[None], probes)
                chosen = [new.start + int(row) for row in rows[0][~unused[0]]]
                for g in range(2):
                    score = saliency(q[2 * g : 2 * g + 2], held_k[g], chosen, new)
                    order = sorted(range(len(new)), key=lambda j, score=score: -score[j])
                    high = round(0.6 * len(new))
                    for part_of, bits in ((order[:high], 4), (order[high:], 2)):
                        tokens = [new.start + j for j in part_of]
                        held_k[g, tokens], held_v[g, tokens] = quantised(k[g, tokens], v[g, tokens], bits)
    assert memory.slots is not None
    assert memory.slots.count == 5
    assert [group.bits for group in memory.packed] == [4, 2] * 3


@pytest.mark.paper("ZipCache", "works_when")
def test_probes_are_the_latest_and_as_many_of_the_others() -> None:
    rows, unused = probe_rows(torch.cat([torch.full((7,), -1), torch.arange(100)])[None], 0.05)
    assert not unused.any()
    assert rows.shape == (1, 10)
    assert rows[0, 5:].tolist() == [102, 103, 104, 105, 106]
    assert len(set(rows[0].tolist())) == 10
    assert rows[0, :5].min() >= 7
    assert rows[0, :5].max() < 102


@pytest.mark.paper("ZipCache", "works_when")
def test_what_is_held_is_codes_and_scales() -> None:
    memory = ZipMemory(Precision(0.6, 4, 2, 100, 0.05))
    q, k = torch.randn(1, 4, 1000, 64).half(), torch.randn(1, 2, 1000, 64).half()
    memory.attend(q, k, k, Look(torch.arange(1000)[None], {}, padded=False))
    codes = 600 * 2 * 2 * 32 + 400 * 2 * 2 * 16
    a_token = 1000 * 2 * (2 + 2 + 4)  # step and least in float16, a position
    a_channel = 2 * 2 * 3 * 64 * 2  # of two groups and heads: step and least of keys, norm of values
    assert sum(group.nbytes for group in memory.packed) == codes + a_token + a_channel
    assert codes + a_token + a_channel < 2 * k.nbytes / 4


@pytest.mark.paper("ZipCache", "works_when")
def test_measured_bytes_error_latency_and_loss() -> None:
    record = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "kv_packed.json").read_text())
    for layer in record["layers"]:
        assert layer["bytes"]["packed"] < layer["bytes"]["float16"] / 4
        assert 0 < layer["error"] < 0.15
        assert set(layer["seconds"]) == {"packed", "float16"}
    losses = {name: sum(each) / len(each) for name, each in record["losses"].items()}
    assert losses["zipcache, 0.6"] - losses["whole"] < 0.05
    for share in (0.6, 0.2):
        assert losses[f"zipcache, {share}"] < losses[f"random, {share}"] - 0.05
