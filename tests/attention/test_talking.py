"""Talking heads against the paper's pseudocode, with masks, other numbers of heads, odd sizes, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate import Packed, attend, attend_talking, causal, key_padding, per_head, topk_blocks, window

B, H, G, D = 2, 4, 2, 5


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def talking(q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor, seen: Tensor) -> Tensor:
    """The paper's pseudocode: J = Q K^T, L = J P_l, W = softmax(L), U = W P_w, O = U V."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(after.shape[1] // v.shape[1], 1)
    dots = torch.einsum("bhnd,bhmd->bnmh", q, k) / math.sqrt(q.shape[3])
    mixed = torch.einsum("bnmh,hs->bnms", dots, before)
    weights = torch.softmax(mixed.masked_fill(~seen[..., None], float("-inf")), 2)
    return torch.einsum("bnms,so,bomd->bond", weights, after, v)


def assert_same(got: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(expected)
    pairs = (torch.autograd.grad((x * cotangent).sum(), leaves) for x in (got, expected))
    for one, other in zip(*pairs, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (4, 9)])
def test_logits_and_weights_are_mixed_over_heads(n: int, m: int, chunk: int) -> None:
    q, k, v = leaf(B, H, n, D), leaf(B, G, m, D), leaf(B, 3, m, 2)
    before, after = leaf(H, 6), leaf(6, 3)
    distance = torch.arange(m)[-n:, None] - torch.arange(m)
    seen = (distance >= 0) & (distance <= 3)
    got = attend_talking(q, k, v, window(3) & causal, before=before, after=after, chunk=chunk)
    assert_same(got, talking(q, k, v, before, after, seen), [q, k, v, before, after])


def test_padding_packs_and_a_temperature() -> None:
    q, k, v, before, after = leaf(B, H, 9, D), leaf(B, G, 9, D), leaf(B, H, 9, D), leaf(H, H), leaf(H, H)
    mask = torch.ones(B, 9, dtype=torch.bool)
    mask[0, 5:] = False
    got = attend_talking(q, k, v, key_padding(mask), before=before, after=after, chunk=4)
    assert_same(got, talking(q, k, v, before, after, mask[:, None]), [q, k, v, before, after])
    text = torch.tensor([0] * 4 + [1] * 5)
    scale = leaf(B, H, 9)
    got = attend_talking(q, k, v, before=before, after=after, layout=Packed([4, 5]), scale=scale)
    expected = talking(q * scale[..., None] * math.sqrt(D), k, v, before, after, text[:, None] == text)
    assert_same(got, expected, [q, k, v, before, after, scale])


def test_silent_heads_are_plain_attention() -> None:
    q, k, v = leaf(B, H, 11, D), leaf(B, G, 11, D), leaf(B, G, 11, 3)
    patterns = (
        per_head([window(2), causal, window(5, 1), causal]),
        topk_blocks(4, k=1) & causal,
        key_padding(torch.zeros(B, 11, dtype=torch.bool)),
    )
    for pattern in patterns:
        torch.testing.assert_close(attend_talking(q, k, v, pattern, chunk=4), attend(q, k, v, pattern))
    eye = torch.eye(H, dtype=torch.float64)
    torch.testing.assert_close(attend_talking(q, k, v, causal, before=eye, after=eye), attend(q, k, v, causal))
    with torch.no_grad():
        torch.testing.assert_close(attend_talking(q, k, v, causal, chunk=5), attend(q, k, v, causal))


def test_one_graph_half_precision_empty_inputs_and_what_is_not_finite() -> None:
    q, k, v = (torch.randn(B, H, 8, D) for _ in range(3))
    before, after = torch.randn(H, H), torch.randn(H, H)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_talking(q, k, v, causal, before=before, after=after)

    expected = run(q, k, v)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), expected)
    half = [x.bfloat16() for x in (q, k, v)]
    assert run(*half).dtype == torch.bfloat16
    torch.testing.assert_close(run(*half).float(), run(*(x.float() for x in half)), atol=0.1, rtol=0.02)
    assert run(q[:, :, :0], k, v).shape == (B, H, 0, D)
    assert torch.equal(run(q, k[:, :, :0], v[:, :, :0]), torch.zeros(B, H, 8, D))
    for spoiled in (k, v):
        spoiled[:, :, 5] = float("nan")
        out = run(q, k, v)
        torch.testing.assert_close(out[:, :, :5], expected[:, :, :5])
        assert out[:, :, 5:].isnan().all()


def test_refusals_in_words() -> None:
    q, k, v = (torch.randn(B, H, 6, D) for _ in range(3))
    mix = torch.randn(H, 3)
    with pytest.raises(ValueError, match="before mixes 4 heads"):
        attend_talking(q, k, v, before=mix.mT)
    with pytest.raises(ValueError, match="after mixes 3 heads"):
        attend_talking(q, k, v, before=mix, after=torch.randn(H, H))
    with pytest.raises(ValueError, match="divide the 3 heads out"):
        attend_talking(q, k, v, before=mix)
    with pytest.raises(ValueError, match="does not divide 3 softmaxes"):
        attend_talking(q, k, v[:, :3], per_head([causal, window(2)]), before=mix)
    with pytest.raises(TypeError, match="after is a float tensor"):
        attend_talking(q, k, v, after=torch.ones(H, H, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 1"):
        attend_talking(q, k, v, chunk=0)
    with pytest.raises(ValueError, match="one length"):
        attend_talking(q, k, v[:, :, 1:])
