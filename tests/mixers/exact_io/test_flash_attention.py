"""FlashAttention and FlashAttention-2: tiles against the dense formula in float64, and what was measured of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate import attend, attend_partial, block_mask, causal, explain, full
from foveate.catalogue.registry import mixer

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
TILED = ("native", "sdpa", "tiles")


def measured(name: str, **wanted: object) -> list[dict[str, Any]]:
    cases = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    return [case for case in cases if all(case[key] == value for key, value in wanted.items())]


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and log row sums; (N, M) booleans say which pairs are visible."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def triangle(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def able(q: Tensor, k: Tensor, v: Tensor, pattern: Any) -> list[str]:
    reasons = explain(q, k, v, pattern).reasons
    return [name for name in TILED if reasons[name] is None]


@pytest.mark.paper("FlashAttention", "definition")
@pytest.mark.paper("FlashAttention-2", "definition")
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_mixer_is_softmax_attention(is_causal: bool) -> None:
    layer = mixer("flash_attention", 12, heads=4, kv_heads=2, causal=is_causal).double()
    x = torch.randn(2, 71, 12, dtype=torch.float64, requires_grad=True)

    def formula() -> Tensor:
        q, k, v = (
            (x @ w.weight.T).unflatten(-1, (-1, 3)).transpose(1, 2) for w in (layer.to_q, layer.to_k, layer.to_v)
        )
        visible = triangle(71, 71) if is_causal else torch.ones(71, 71, dtype=torch.bool)
        return dense(q, k, v, visible)[0].transpose(1, 2).flatten(2) @ layer.to_out.weight.T

    follows(layer, lambda: layer(x), formula, x)


@pytest.mark.paper("FlashAttention", "works_when")
@pytest.mark.paper("FlashAttention-2", "works_when")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "queries", "keys", "dim"), [(4, 97, 97, 64), (1, 65, 131, 72), (2, 33, 200, 256)])
def test_every_tiled_backend_is_near_the_dense_reference(
    groups: int, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> None:
    """Shared keys, odd lengths, fewer queries than keys, heads of up to 256 channels; outputs, row sums, gradients."""
    q = torch.randn(2, 4, queries, dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, groups, keys, dim, dtype=dtype, requires_grad=True) for _ in range(2))
    near = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for pattern, visible in ((causal, triangle(queries, keys)), (full, torch.ones(queries, keys, dtype=torch.bool))):
        expected, sums = dense(q, k, v, visible)
        towards = torch.randn_like(expected)
        wanted = torch.autograd.grad((expected * towards).sum(), (q, k, v))
        names = able(q, k, v, pattern)
        assert "tiles" in names
        for impl in names:
            out = attend(q, k, v, pattern, impl=impl)
            torch.testing.assert_close(out.double(), expected, **near)
            if impl != "sdpa":  # torch's function keeps them to itself
                lse = attend_partial(q, k, v, pattern, impl=impl).lse
                assert lse is not None
                torch.testing.assert_close(lse.double(), sums, **near)
            found = torch.autograd.grad((out.double() * towards).sum(), (q, k, v))
            for one, other in zip(found, wanted, strict=True):
                scale = float(other.float().abs().max())
                torch.testing.assert_close(one / scale, other / scale, **near)


@pytest.mark.paper("FlashAttention", "works_when")
@pytest.mark.paper("FlashAttention-2", "works_when")
@pytest.mark.parametrize("impl", TILED)
def test_peak_memory_was_measured_linear_in_the_tokens(impl: str) -> None:
    """From 2,048 to 32,768 tokens the table grows 256 times; a call's memory 16 times, and no more."""
    taken = {case["tokens"]: case["bytes"] for case in measured("flash_attention", task="memory", impl=impl)}
    assert taken[2**15] < 1.25 * 16 * taken[2**11]
    assert taken[2**15] < 0.05 * 2 * 2**30 * 4  # of one float32 table for each of two heads
    tables = {case["tokens"]: case["bytes"] for case in measured("flash_attention", task="memory", impl="reference")}
    assert tables[2**12] > 3.5 * tables[2**11]  # the formula's grows as the square, where it can be seen to


@pytest.mark.paper("FlashAttention", "works_when")
def test_blocks_that_a_mask_hides_are_left_out() -> None:
    q = torch.randn(1, 2, 193, 16, requires_grad=True)
    k, v = (torch.randn(1, 2, 193, 16, requires_grad=True) for _ in range(2))
    table = torch.rand(4, 4) < 0.4
    table.fill_diagonal_(True)
    visible = table.repeat_interleave(64, 0).repeat_interleave(64, 1)[:193, :193]
    expected, _ = dense(q, k, v, visible)
    towards = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * towards).sum(), (q, k, v))
    names = able(q, k, v, block_mask(table, 64))
    assert "tiles" in names
    for impl in names:
        out = attend(q, k, v, block_mask(table, 64), impl=impl)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
        found = torch.autograd.grad((out.double() * towards).sum(), (q, k, v))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    layer = mixer("flash_attention", 32, heads=2, causal=False, pattern=block_mask(table, 64))
    whole = mixer("flash_attention", 32, heads=2, causal=False)
    assert layer.flops(193) < whole.flops(193)


@pytest.mark.paper("FlashAttention", "works_when")
@pytest.mark.parametrize("impl", ["native", "tiles"])
def test_time_was_measured_to_fall_with_the_share_of_blocks(impl: str) -> None:
    for task in ("forward", "forward + backward"):
        times = {case["share"]: case["seconds"][task] for case in measured("flash_attention", task="time", impl=impl)}
        assert times[0.125] < times[0.25] < times[0.5] < times[1.0]
        slack = 0.05 if impl == "native" else 0.1  # of the whole, what does not depend on the share
        assert all(times[share] < (share + slack) * times[1.0] for share in (0.125, 0.25, 0.5))


@pytest.mark.paper("FlashAttention-2", "works_when")
def test_more_than_half_of_the_peak_was_measured() -> None:
    cases = measured("flash_attention_2")
    kinds = {(case["task"], case["dim"], case["pattern"]) for case in cases}
    tasks, dims, patterns = ("forward", "forward + backward"), (64, 128, 256), ("full", "causal")
    assert kinds == {(task, dim, pattern) for task in tasks for dim in dims for pattern in patterns}
    for case in cases:
        assert 0.55 < case["of_limit"] < 0.95
        assert abs(case["operations_per_second"] / case["limit"] - case["of_limit"]) < 1e-9
