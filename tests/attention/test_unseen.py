"""A row depends on no key that it does not see: not even on one that is NaN or infinite, nor do gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import Packed, alibi, attend, causal, full, key_padding, sinks, topk_blocks, window
from foveate.kernels.cpu.loader import library

LENGTH = 150
MASK = torch.ones(2, LENGTH, dtype=torch.bool)
MASK[:, 70:75] = False
CASES = [
    (causal, None),
    (window(9) & causal | sinks(3), None),
    (full, Packed([70, 5, 75])),
    (key_padding(MASK), None),
    (topk_blocks(16, k=2) & window(20) & causal, None),
]


@pytest.mark.parametrize("impl", ["reference", "tiles", "auto", "native"])
@pytest.mark.parametrize("weights", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("pattern", "layout"), CASES, ids=str)
@pytest.mark.parametrize(
    ("which", "bad"), [("k", float("nan")), ("v", float("nan")), ("v", float("inf")), ("q", float("nan"))]
)
def test_what_is_not_finite_stays_among_those_who_see_it(
    which: str, bad: float, pattern: Any, layout: Any, weights: str, impl: str
) -> None:
    if impl == "native" and library() is None:
        pytest.skip("there are no native kernels here")
    dtype = torch.float32 if impl == "native" else torch.float64  # which no native kernel takes
    q, k, v = (torch.randn(2, heads, LENGTH, 4, dtype=dtype) for heads in (4, 2, 2))
    slopes, at = torch.rand(4, dtype=dtype), 80 if which == "q" else 72  # padding, of keys
    mask = pattern.select(q, k, layout).to_dense().expand(2, 4, -1, -1)
    spoiled = {"q": q, "k": k, "v": v}
    spoiled[which] = spoiled[which].clone()
    spoiled[which][:, :, at, 1] = bad

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        chosen = dict(weights=weights, layout=layout, bias=alibi(slopes), impl=impl)
        out = attend(*leaves, pattern, **chosen) if not pattern.is_dynamic else attend(*leaves, held, **chosen)
        loss = (
            out if impl in ("reference", "native") else out.square()
        )  # whose own products spread gradients that are NaN
        return out, list(torch.autograd.grad(loss.sum(), leaves))

    held = key_padding(torch.ones(2, LENGTH, dtype=torch.bool)) & causal if pattern.is_dynamic else pattern
    if pattern.is_dynamic:  # a NaN may choose anything: the choice is not what is tested
        mask = held.select(q, k).to_dense().expand(2, 4, -1, -1)
    rows = torch.zeros(2, 4, LENGTH, dtype=torch.bool)  # that see it
    if which == "q":
        rows[:, :, at] = mask[:, :, at].any(-1)
    else:
        rows |= mask[:, :, :, at]
    keys = (mask & rows.unsqueeze(-1)).any(2).unflatten(1, (2, 2)).any(2)  # that such rows see
    (want, (dq, dk, dv)), (out, (gq, gk, gv)) = run({"q": q, "k": k, "v": v}), run(spoiled)
    torch.testing.assert_close(out[~rows], want[~rows])
    assert (~out[rows].isfinite()).any(-1).all()  # in one channel at least
    torch.testing.assert_close(gq[~rows], dq[~rows])
    for got, expected in ((gk, dk), (gv, dv)):
        torch.testing.assert_close(got[~keys], expected[~keys])
