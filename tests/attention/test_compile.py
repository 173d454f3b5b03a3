"""attend under torch.compile: one graph, the same values, the same gradients."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from foveate import (
    Grid,
    alibi,
    attend,
    causal,
    explain,
    full,
    key_padding,
    neighborhood,
    parse,
    per_head,
    relative_table,
    sinks,
    softmax,
    topk_blocks,
    window,
)
from foveate.kernels.cpu.loader import library, status

PADDING = torch.ones(2, 77, dtype=torch.bool)
PADDING[0, :9] = False

CASES = {
    "sdpa": (causal, {}),
    "tiles": (window(20) & causal | sinks(3), {"weights": "sigmoid"}),
    "padding": (key_padding(PADDING) & causal, {"softcap": 5.0}),
    "heads": (per_head([window(5), full]) & causal, {"weights": softmax(sink=1.0)}),
    "grid": (neighborhood(3), {"layout": Grid(7, 11), "softcap": 5.0}),
    "dynamic": (topk_blocks(8, k=2) | window(4) & causal, {"weights": softmax(sink=0.5)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", ["none", "alibi", "relative"])
def test_one_graph_equals_eager(case: str, bias: str) -> None:
    pattern, options = CASES[case]
    parameter = torch.rand(2, 7, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        biases = {"none": None, "alibi": alibi(parameter[:, 0]), "relative": relative_table(parameter)}
        return attend(q, k, v, pattern, bias=biases[bias], **options)

    inputs = [torch.randn(2, 2, 77, 8, requires_grad=True) for _ in range(3)]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted = inputs if bias == "none" else [*inputs, parameter]
    expected, got = run(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    pairs = zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (got, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_a_pattern_made_inside_the_graph() -> None:
    def run(q: Tensor) -> Tensor:
        return attend(q, q, q, window(9) & causal | sinks(2), weights="relu")

    q = torch.randn(1, 2, 40, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))


@pytest.mark.parametrize("kernels", ["tiles", "native"])
def test_the_operator_is_well_made(kernels: str) -> None:
    if kernels == "native" and library() is None:
        pytest.skip(f"no native kernels: {status().reason}")
    q, k, v = (torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3))
    slopes = torch.rand(2, requires_grad=True)
    text = f"{kernels}\nsoftmax\nwindow(20) & causal\nSequence()\nAlibi"
    explain(q, k, v)  # the operator is defined on first use of the package
    import foveate.attention.impl.ops  # noqa: F401

    arguments = q, k, v, [slopes], [], text, 0.3, 2.0
    torch.library.opcheck(torch.ops.foveate.attend_selected, (*arguments, 0.0, None))
    if kernels == "tiles":
        torch.library.opcheck(torch.ops.foveate.attend_selected, (*arguments, 0.2, torch.tensor([3, 0, 0, 0])))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("text", ["random_blocks(16, 0.3, seed=3)", "topk_blocks(8, k=2)"])
def test_small_masks_are_those_of_eager_code_under_inductor(text: str) -> None:
    q, pattern = torch.randn(1, 2, 100, 8), parse(text)
    torch._dynamo.reset()  # inductor folds traced index arithmetic, which a hash does not survive
    compiled = torch.compile(lambda q: attend(q, q, q, pattern), fullgraph=True)
    torch.testing.assert_close(compiled(q), attend(q, q, q, pattern))
