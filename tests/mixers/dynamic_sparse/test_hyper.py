"""HyperAttention: sorted hashes, blocks and samples written out, and what they tend to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate import causal, full
from foveate.catalogue.registry import mixer
from foveate.mixers.dynamic_sparse.hyper import HyperCore

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
BITS, BLOCK, BELOW = 3, 8, 14
GRAY = [0b000, 0b001, 0b011, 0b010, 0b110, 0b111, 0b101, 0b100]  # neighbours differ in one bit


def places(x: Tensor, directions: Tensor) -> list[int]:
    """Of each row of x (N, D) in Gray code's order of its signs."""
    signs = (x.detach() @ directions.double() > 0).tolist()
    return [GRAY.index(sum(2**bit for bit, ahead in enumerate(row) if ahead)) for row in signs]


def parts_whole(core: HyperCore, q: Tensor, k: Tensor, v: Tensor, ordered: bool) -> tuple[Tensor, Tensor]:
    """Sums of weighted values (N, D) and of weights (N,) of one head."""
    directions, length = core.directions(q.shape[1]), len(k)
    logits = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
    if len(q) < core.exact_below or length <= core.block:
        return logits @ v, logits.sum(1)
    of_keys, of_queries = places(k, directions), places(q, directions)
    order = sorted(range(length), key=lambda j: (of_keys[j], j))
    ranked = sorted(range(len(q)), key=lambda i: (of_queries[i], i))
    block_of_key = {j: rank // core.block for rank, j in enumerate(order)}
    num_blocks, drawn = math.ceil(length / core.block), {order[place] for place in core.sampled(length).tolist()}
    weights = torch.zeros(len(q), length, dtype=q.dtype)
    for i in range(len(q)):
        if ordered:
            alike = [rank for rank, j in enumerate(order) if of_keys[j] == of_queries[i]]
            less = sum(place < of_queries[i] for place in of_keys)
            block = min(alike[i % len(alike)] if alike else less, length - 1) // core.block
        else:
            block = ranked.index(i) * num_blocks // len(q)
        for j in range(length):
            weights[i, j] = 1 if block_of_key[j] == block else length / len(drawn) if j in drawn else 0
    return (weights * logits) @ v, (weights * logits).sum(1)


def parts_causal(core: HyperCore, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    length = len(q)
    if length <= max(core.exact_below, 1):
        weights = torch.exp(q @ k.T / math.sqrt(q.shape[1])).tril()
        return weights @ v, weights.sum(1)
    cut = length // 2
    first, second = parts_causal(core, q[:cut], k[:cut], v[:cut]), parts_causal(core, q[cut:], k[cut:], v[cut:])
    across = parts_whole(core, q[cut:], k[:cut], v[:cut], ordered=True)
    return tuple(torch.cat([a, b + c]) for a, b, c in zip(first, second, across, strict=True))  # type: ignore[return-value]


def formula(core: HyperCore, q: Tensor, k: Tensor, v: Tensor, within: object) -> Tensor:
    group, heads = q.shape[1] // k.shape[1], []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            one = q[b, h], k[b, h // group], v[b, h // group]
            top, total = parts_causal(core, *one) if within == causal else parts_whole(core, *one, ordered=False)
            heads.append(top / total[:, None])
    return torch.stack(heads).unflatten(0, q.shape[:2])


def inputs(length: int, keys: int | None = None) -> list[Tensor]:
    shapes = ((2, 4, length, 6), (2, 2, keys or length, 6), (2, 2, keys or length, 5))
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.paper("HyperAttention", "definition")
@pytest.mark.paper("HyperAttention", "works_when")
@pytest.mark.parametrize(("within", "sizes"), [(full, (48,)), (full, (45, 61)), (full, (13, 61)), (causal, (61,))])
def test_the_core_is_its_formula_forward_and_backward(within: object, sizes: tuple[int, ...]) -> None:
    core = HyperCore(BLOCK, 9, BITS, BELOW, seed=3, draw=4)
    q, k, v = inputs(*sizes)
    expected, out = formula(core, q, k, v, within), core(q, k, v, within=within)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), towards) for y in (out, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("HyperAttention", "definition")
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_mixer_is_its_projections_around_the_formula(is_causal: bool) -> None:
    options = {"block": BLOCK, "samples": 9, "bits": BITS, "exact_below": BELOW, "seed": 5}
    made = mixer("hyper_attention", 24, heads=4, kv_heads=2, causal=is_causal, **options).double().eval()
    x = torch.randn(2, 41, 24, dtype=torch.float64)
    q, k, v = (layer(x).unflatten(2, (-1, 6)).transpose(1, 2) for layer in (made.to_q, made.to_k, made.to_v))
    expected = formula(HyperCore(BLOCK, 9, BITS, BELOW, 5, 5), q, k, v, causal if is_causal else full)
    torch.testing.assert_close(made(x), made.to_out(expected.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("HyperAttention", "works_when")
@pytest.mark.parametrize("within", [causal, full])
@pytest.mark.parametrize(("block", "samples"), [(100, 1), (8, 100)])
def test_blocks_or_samples_that_cover_all_keys_are_exact(within: object, block: int, samples: int) -> None:
    q, k, v = inputs(61)
    mask = torch.ones(61, 61).tril().bool() if within == causal else torch.ones(61, 61).bool()
    logits = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(6)).masked_fill(~mask, float("-inf"))
    out = HyperCore(block, samples, BITS, 4)(q, k, v, within=within)  # type: ignore[arg-type]
    torch.testing.assert_close(out, logits.softmax(-1) @ v.repeat_interleave(2, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("HyperAttention", "works_when")
def test_sums_are_right_on_average_and_the_error_falls_with_the_samples() -> None:
    """No key counts twice: else sums would be too great."""
    q, k, v = (x.detach() for x in inputs(96))
    logits = torch.exp(q @ k.repeat_interleave(2, 1).mT / math.sqrt(6))
    exact, total = logits @ v.repeat_interleave(2, 1) / logits.sum(-1, keepdim=True), logits.sum(-1)
    errors = []
    for samples in (6, 24, 72):
        drawn = [HyperCore(BLOCK, samples, BITS, 4, draw=draw).whole(q, k, v) for draw in range(16)]
        mean = torch.stack([part.lse.exp() for part in drawn]).mean(0)  # type: ignore[union-attr]
        assert abs(float((mean / total).mean()) - 1) < 0.05
        errors.append(float(torch.stack([(part.out - exact).square().mean() for part in drawn]).mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.paper("HyperAttention", "works_when")
def test_no_later_token_reaches_an_earlier_output() -> None:
    core = HyperCore(BLOCK, 9, BITS, 6)
    q, k, v = (x.detach() for x in inputs(67))
    out = core(q, k, v, within=causal)
    for cut in range(3, 67, 14):
        changed = [torch.cat([x[:, :, :cut], torch.randn_like(x[:, :, cut:])], 2) for x in (q, k, v)]
        torch.testing.assert_close(core(*changed, within=causal)[:, :, :cut], out[:, :, :cut], rtol=1e-9, atol=1e-9)


def test_while_training_samples_are_drawn_afresh() -> None:
    made = mixer("hyper_attention", 16, heads=2, block=4, samples=5, exact_below=4).train()
    x = torch.randn(1, 40, 16)
    assert not torch.equal(made(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


def test_what_it_cannot_sample_is_refused() -> None:
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match="no bias and no other weights"):
        HyperCore()(q, k, v, weights="sigmoid")
    with pytest.raises(ValueError, match="got 0, 256, 7 and 4096"):
        HyperCore(block=0)


@pytest.mark.paper("HyperAttention", "works_when")
def test_it_was_measured_in_nearly_linear_time_with_its_error() -> None:
    cases = json.loads((RESULTS / "dynamic_text_cpu.json").read_text(encoding="utf-8"))["cases"]
    own = {case["tokens"]: case for case in cases if case["mechanism"] == "hyper_attention"}
    assert {4096, 8192, 16384, 32768, 65536, 131072} <= own.keys()
    for length in (8192, 16384, 32768, 65536):  # by n log n 2.4 times at most, dense 4 times
        assert own[2 * length]["seconds"]["sparse"] < 3 * own[length]["seconds"]["sparse"]
    assert own[131072]["seconds"]["dense"] > 5 * own[131072]["seconds"]["sparse"]
    assert all(0 <= case["error"] < 0.15 for case in own.values())
    assert own[4096]["error"] < 1e-5  # below 4096 queries all are seen


def test_a_query_whose_hash_is_beyond_all_keys_takes_the_block_at_the_end() -> None:
    core = HyperCore(BLOCK, 9, BITS, 0)
    directions = core.directions(6).double()
    of_codes = {places(x[None], directions)[0]: x for x in torch.randn(400, 6, dtype=torch.float64)}
    k = of_codes[3].expand(1, 1, 20, 6)
    for code, block in ((0, 0), (7, 2)):
        labels, _ = core.blocks(of_codes[code].expand(1, 1, 5, 6), k, True)
        assert labels.flatten().tolist() == [block] * 5
    labels, _ = core.blocks(of_codes[3].expand(1, 1, 25, 6), k, True)
    assert labels.flatten().tolist() == [i % 20 // BLOCK for i in range(25)]  # of equal ones each its own
