"""Properties of attention over a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.patterns import key_padding
from foveate.testing.closeness import assert_same, assert_twice, assert_zero, reference_only
from foveate.testing.pattern_case import Heads, PatternCase


def attention(case: PatternCase) -> None:
    """Outputs and gradients are those of the definition, in float64."""
    heads = case.draw()
    towards = torch.randn_like(heads.q)
    mine = _outputs(case, heads, towards)
    with reference_only():
        plain = _outputs(case, heads, towards)
    for name, found in mine.items():
        assert_same(name, found, plain[name])


def half_precision(case: PatternCase) -> None:
    """In bfloat16, outputs and gradients err at most twice as much as the definition's, plus one rounding."""
    heads = case.draw(torch.bfloat16)
    towards = torch.randn_like(heads.q)
    mine = _outputs(case, heads, towards)
    with reference_only():
        plain = _outputs(case, heads, towards)
        exact = _outputs(case, Heads(*(x.double() for x in heads)), towards.double())
    assert_twice("outputs", mine.pop("out"), plain["out"], exact.pop("out"))
    greatest = max(float(gradient.norm()) for gradient in exact.values())  # with one key, that of q cancels to 0
    for name, found in mine.items():
        assert_twice(name, found, plain[name], exact[name], size=greatest)


def fully_masked_rows(case: PatternCase) -> None:
    """A query that sees no key gives zeros, leaves finite gradients, and does not disturb those beside it."""
    heads = case.draw()
    real = torch.rand(heads.q.shape[0], case.num_keys) < 0.8
    real[:, : case.num_keys // 2] = False
    real[0] = False
    masked = PatternCase(case.pattern & key_padding(real), case.layout, case.num_queries, case.num_keys)
    towards = torch.randn_like(heads.q)
    found = _outputs(masked, heads, towards)
    unseen = ~masked.mask(heads).any(-1)
    rows = unseen.repeat_interleave(heads.q.shape[1] // unseen.shape[1], 1).expand(heads.q.shape[:3])
    assert_zero("outputs of queries that see no key", found["out"][rows])
    with reference_only():
        plain = _outputs(masked, heads, towards)
    for name, tensor in found.items():
        assert tensor.isfinite().all(), f"{name} is not finite where some queries see no key"
        assert_same(f"{name} where some queries see no key", tensor, plain[name])


def _outputs(case: PatternCase, heads: Heads, towards: Tensor) -> dict[str, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in heads)
    out = attend(q, k, v, case.pattern, layout=case.layout)
    gradients = torch.autograd.grad((out * towards).sum(), (q, k, v))
    names = ("gradient of q", "gradient of k", "gradient of v")
    return {"out": out.detach()} | dict(zip(names, gradients, strict=True))
