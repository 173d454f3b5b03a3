"""What `recur` and `step` refuse, and in which words."""

from __future__ import annotations

import pytest
import torch
from tests.support.recur_inputs import make_inputs, recur, step

X = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"impl": "fast"}, ValueError, "'auto' or one of native, chunks, reference; got 'fast'"),
        ({"a": X(2, 4, 9, 7), "b": X(2, 4, 9, 6)}, ValueError, r"b of low_rank must be .* got \(2, 4, 9, 6\)"),
        ({"a": X(2, 4, 9, 7), "b": X(2, 2, 9, 7)}, ValueError, "as many heads, got 4 and 2"),
        ({"a": X(2, 4, 9, 7), "b": None}, TypeError, "b must be a tensor, got NoneType"),
        ({"a": X(2, 4, 9, 7), "b": X(2, 4, 9, 7), "beta": X(2, 1, 9)}, ValueError, "takes neither low_rank"),
        ({"bonus": X(4, 7), "beta": X(2, 1, 9)}, ValueError, "nor bonus"),
        ({"bonus": X(4, 6)}, ValueError, r"\(4, 7\) or q's \(2, 4, 9, 7\), got \(4, 6\)"),
        ({"causal": False, "bonus": X(4, 7)}, ValueError, "low_rank or bonus"),
        ({"chunk": 48}, ValueError, "power of two, got 48"),
        ({"chunk": 0}, ValueError, "power of two, got 0"),
        ({"q": X(4, 9, 7)}, ValueError, r"\(batch, heads, length, dim\), got q \(4, 9, 7\)"),
        ({"q": X(3, 4, 9, 7)}, ValueError, "share their batch size"),
        ({"q": X(2, 4, 9, 8)}, ValueError, "share their head dim"),
        ({"v": X(2, 1, 8, 5)}, ValueError, "k and v must have the same length"),
        ({"q": X(2, 4, 8, 7)}, ValueError, "q has 8 tokens and k 9"),
        ({"q": X(2, 3, 9, 7)}, ValueError, "k has 2 heads, which do not divide the 3 heads of q"),
        ({"v": X(2, 3, 9, 5)}, ValueError, "v has 3 heads, which do not divide the 4 heads of q"),
        ({"q": X(2, 0, 9, 7)}, ValueError, "at least 1"),
        ({"q": X(2, 4, 9, 0), "k": X(2, 2, 9, 0)}, ValueError, "at least 1"),
        ({"k": X(2, 2, 9, 7, dtype=torch.int64)}, TypeError, "k must have a floating dtype, got torch.int64"),
        ({"k": X(2, 2, 9, 7, device="meta")}, ValueError, "k is on meta but q on cpu"),
        ({"decay": X(2) + 0.9}, ValueError, r"at most 0, but reaches 0.9; .* pass decay.log\(\)"),
        ({"decay": X(2) * torch.nan}, ValueError, "at most 0, but reaches nan"),
        ({"decay": X(3)}, ValueError, "decay has 3 heads"),
        ({"decay": X(2, 4)}, ValueError, r"with B, N, D = 2, 9, 7, got \(2, 4\)"),
        ({"decay": X(2, 4, 9, 1)}, ValueError, r"got \(2, 4, 9, 1\)"),
        ({"decay": torch.tensor(-1.0)}, ValueError, r"decay must be \(heads,\).* got \(\)"),
        ({"beta": X(2, 2, 9) + 2.5}, ValueError, r"\[0, 2\], but spans \[2.5, 2.5\]"),
        ({"beta": X(2, 2, 9) - 1}, ValueError, r"\[0, 2\], but spans \[-1, -1\]"),
        ({"beta": X(2, 2)}, ValueError, r"beta must be \(B, heads, N\)"),
        ({"beta": X(2, 3, 9)}, ValueError, "beta has 3 heads"),
        ({"causal": False, "beta": X(2, 2, 9)}, ValueError, "takes neither decay nor beta"),
        ({"causal": False, "decay": X(4)}, ValueError, "takes neither decay nor beta"),
        ({"lengths": [9]}, ValueError, "batch size 1, got 2"),
        ({"state": X(2, 4, 7, 5)}, ValueError, r"\(2, 2, 7, 5\), got \(2, 4, 7, 5\)"),
        ({"state": X(2, 2, 7, 5).double()}, TypeError, "must be torch.float32 .* got torch.float64"),
        ({"state": X(2, 2, 7, 5, device="meta")}, ValueError, "q's device cpu, got meta"),
    ],
)
def test_recur_refuses(changes: dict, error: type[Exception], words: str) -> None:
    inputs = make_inputs(heads=(4, 2, 1, 1), length=9, dtype=torch.float32)
    recur(**inputs)
    with pytest.raises(error, match=words):
        recur(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([4, 4], "sum to 8, but q, k and v have 9"),
        ([10, -1], "0 or more"),
        ([], "at least one sequence"),
    ],
)
def test_packing_refuses(lengths: list[int], words: str) -> None:
    inputs = make_inputs(batch=1, length=9)
    with pytest.raises(ValueError, match=words):
        recur(**inputs, lengths=lengths)


def test_packing_wants_one_state_per_sequence() -> None:
    inputs = make_inputs(batch=1, length=9)
    with pytest.raises(ValueError, match=r"\(2, 2, 7, 5\), got \(1, 2, 7, 5\)"):
        recur(**inputs, lengths=[4, 5])


def test_step_refuses_several_tokens() -> None:
    with pytest.raises(ValueError, match=r"one token, .* got q \(2, 2, 9, 7\); use recur"):
        step(**make_inputs(length=9))
