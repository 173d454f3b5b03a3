"""MTLA against its formula over a dense table with the stride-aware mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.llama_by_hand import turned
from torch import Tensor

from foveate.catalogue.registry import mixer

DIM, HEADS, RANK, NOPE, ROPE, VALUE = 10, 3, 9, 5, 4, 2


def made(stride: int, random: bool, **options: Any) -> Any:
    sizes = {"rank": RANK, "nope_dim": NOPE, "rope_dim": ROPE, "value_dim": VALUE, "stride": stride}
    layer = mixer("mtla", dim=DIM, heads=HEADS, **sizes, **options).double()
    if random:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    return layer


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    spread = x - x.mean(-1, keepdim=True)
    return spread / (spread.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def position(number: int) -> Tensor:
    angles = [number * 10_000.0 ** (-(c - c % 2) / RANK) for c in range(RANK)]
    numbers = torch.tensor(angles, dtype=torch.float64)
    return torch.where(torch.arange(RANK) % 2 == 0, numbers.sin(), numbers.cos())


def dense(layer: Any, x: Tensor, stride: int, weighted: bool = True) -> Tensor:
    """One text (N, C): keys and values of every head written out, the mask entry by entry."""
    w, count = dict(layer.named_parameters()), len(x)
    if "to_q.weight" in w:
        q = x @ w["to_q.weight"].T
    else:
        q = normed(x @ w["to_q.0.weight"].T, w["to_q.1.weight"], w["to_q.1.bias"]) @ w["to_q.2.weight"].T
    q = q.view(count, HEADS, NOPE + ROPE)
    both = x @ w["to_latent.weight"].T
    c = normed(both[:, :RANK], w["norm.weight"], w["norm.bias"])
    merged: list[Tensor] = []
    for n in range(count):
        total = torch.zeros(RANK, dtype=x.dtype)
        for i in range(n // stride * stride, n + 1):
            place = w["of_chunk.weight"] @ position(i // stride) + w["of_chunk.bias"]
            weight = 1 / (1 + torch.exp(-(w["of_token.weight"] @ c[i] + w["of_token.bias"]) @ place))
            total = total + (weight if weighted else 1.0) * c[i]
        merged.append(total)
    latent = torch.stack(merged)
    kv = (latent @ w["to_kv.weight"].T).view(count, HEADS, NOPE + VALUE)
    at = torch.arange(count)
    k_rope = turned(both[:, RANK:], at)
    seen = torch.tensor([[n == m or (n < m and (n + 1) % stride == 0) for n in range(count)] for m in range(count)])
    out = []
    for h in range(HEADS):
        scores = q[:, h, :NOPE] @ kv[:, h, :NOPE].T + turned(q[:, h, NOPE:], at) @ k_rope.T
        weights = (scores / (NOPE + ROPE) ** 0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(weights @ kv[:, h, NOPE:])
    return torch.cat(out, 1) @ w["to_out.weight"].T


@pytest.mark.paper("MTLA", "definition")
@pytest.mark.parametrize("random", [False, True], ids=["initial", "random"])
@pytest.mark.parametrize(("stride", "length"), [(1, 7), (2, 13), (4, 19), (5, 20), (7, 3)])
def test_it_is_the_formula_with_its_gradients(stride: int, length: int, random: bool) -> None:
    layer = made(stride, random)
    x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, length, DIM, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    out, want = layer(x), torch.stack([dense(layer, one, stride) for one in x])
    torch.testing.assert_close(out, want)
    for one, other in zip(
        torch.autograd.grad((out * cotangent).sum(), wanted),
        torch.autograd.grad((want * cotangent).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.paper("MTLA", "definition")
def test_queries_may_come_from_few_channels() -> None:
    layer = made(3, True, query_rank=4)
    x = torch.randn(1, 11, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], dense(layer, x[0], 3))


@pytest.mark.paper("MTLA", "works_when")
@pytest.mark.parametrize("cuts", [[1] * 23, [9, 1, 1, 1, 6, 5], [22, 1]])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_training_equals_decoding_at_every_position(stride: int, cuts: list[int]) -> None:
    layer = made(stride, True)
    x = torch.randn(2, 23, DIM, dtype=torch.float64)
    with torch.no_grad():
        want, state, at = torch.stack([dense(layer, one, stride) for one in x]), layer.init_state(2), 0
        for count in cuts:
            step = layer.decode if count == 1 else layer.prefill
            out, state = step(x[:, at : at + count], state)
            torch.testing.assert_close(out, want[:, at : at + count])
            at += count
            assert state.chunks.length == at // stride  # beside them, the sum of the chunk begun
    numbers = [layer.state_bytes(n) / 8 for n in (0, 1000)]
    assert numbers == [RANK, RANK + 1000 // stride * (RANK + ROPE)]


@pytest.mark.paper("MTLA", "works_when")
def test_at_stride_one_and_weight_one_it_is_latent_attention() -> None:
    layer = made(1, True)
    with torch.no_grad():
        for part in (layer.of_chunk, layer.of_token):
            part.weight.zero_()
            part.bias.fill_(50.0)
        x = torch.randn(1, 12, DIM, dtype=torch.float64)
        torch.testing.assert_close(layer(x)[0], dense(layer, x[0], 1, weighted=False))


@pytest.mark.paper("MTLA", "works_when")
def test_texts_of_several_lengths_in_a_batch_are_each_as_alone() -> None:
    layer = made(3, True)
    x = torch.randn(3, 17, DIM, dtype=torch.float64)
    real = torch.zeros(3, 17, dtype=torch.bool)
    parts = [slice(0, 17), slice(0, 8), slice(7, 17)]
    for entry, part in enumerate(parts):
        real[entry, part] = True
    with torch.no_grad():
        out = layer(x, padding=real)
        for entry, part in enumerate(parts):
            torch.testing.assert_close(out[entry, part], dense(layer, x[entry, part], 3))
    assert out[~real].eq(0).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        mixer("mtla", dim=8, heads=2, rope_dim=3)
