"""Hedgehog: its formula, and that its maps learn the weights of real attention layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.support.linear_text import DIM, HEADS, decoded, make, project, row_shares, tokens
from torch import Tensor
from torch.testing import assert_close

from foveate.adapt import replace_attention
from foveate.catalogue.registry import row
from foveate.layers.rotary import rotate
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.base import join_heads
from foveate.mixers.core import PatternCore
from foveate.mixers.linear.hedgehog import (
    Hedgehog,
    HedgehogMap,
    HedgehogMaps,
    cross_entropy,
    linear_weights,
    linearised,
    mimic,
    softmax_weights,
)
from foveate.mixers.linear.linear_transformer import elu_plus_one
from foveate.models import builtin
from foveate.patterns import Packed, causal


def features(map: HedgehogMap, x: Tensor) -> Tensor:
    exponents = torch.einsum("hij,bhnj->bhni", map.turn, x) + map.shift[None, :, None]
    return torch.cat([exponents.exp(), (-exponents).exp()], -1)


@pytest.mark.paper("Hedgehog", "definition")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotary", [None, 100.0])
def test_hedgehog_weighs_by_exponential_features(causal: bool, rotary: float | None) -> None:
    mixer, x = make(Hedgehog, heads=HEADS, causal=causal, rotary=rotary), tokens()
    q, k, v = project(mixer, x)
    if rotary is not None:
        q, k = (rotate(y, torch.arange(x.shape[1]), rotary) for y in (q, k))
    weights = features(mixer.maps.q, q) @ features(mixer.maps.k, k).mT
    weights = weights.tril() if causal else weights
    assert_close(mixer(x), mixer.to_out(join_heads(row_shares(weights) @ v)))


def test_rotary_positions_count_in_documents_and_decoders() -> None:
    mixer, x, lengths = make(Hedgehog, heads=HEADS, rotary=100.0), tokens(20, batch=1), [7, 0, 13]
    assert_close(mixer(x, layout=Packed(lengths)), torch.cat([mixer(x[:, :7]), mixer(x[:, 7:])], 1))
    out, state = mixer.prefill(x[:, :9], mixer.init_state(1))
    assert_close(torch.cat([out, decoded(mixer, x[:, 9:], state)[0]], 1), mixer(x))
    real = torch.arange(20)[None] < 15
    assert_close(mixer(x, padding=real)[:, :15], mixer(x[:, :15]))
    with pytest.raises(ValueError, match="on the right"):
        mixer(x, padding=~real)


def test_far_exponents_stay_finite() -> None:
    mixer = Hedgehog(DIM, HEADS)
    x = (1e4 * torch.randn(2, 50, DIM)).requires_grad_()
    out = mixer(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.isfinite().all() and gradient.isfinite().all()


def divergence(target: Tensor, weights: Tensor) -> float:
    """Mean KL divergence of rows."""
    return (cross_entropy(target, weights) - cross_entropy(target, target)).item()


def cycle(q: Tensor, k: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        at = slice(step % q.shape[0], step % q.shape[0] + 1)
        yield q[at], k[at]


class Recorder(PatternCore):
    """Plain attention that keeps the queries and keys it was given."""

    def __init__(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        object.__setattr__(self, "seen", seen)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.seen.append((q.detach(), k.detach()))  # type: ignore[attr-defined]
        return super().__call__(q, k, v, **options)


def test_maps_mimic_a_real_models_attention() -> None:
    model, tokenizer = builtin.load()
    ids = tokenizer(builtin.heldout_text(10_000), return_tensors="pt").input_ids
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), replace_attention(model, Recorder(seen)):
        model(ids[:, : ids.shape[1] // 128 * 128].view(-1, 128))
    q, k = seen[len(seen) // 2]
    maps = HedgehogMaps(q.shape[1], k.shape[1], q.shape[3])
    losses = mimic(maps, cycle(q[:-6], k[:-6], 240))
    target = softmax_weights(q[-6:], k[-6:])  # of text that the maps have not seen
    mimicked = divergence(target, linear_weights(maps.q(q[-6:]), maps.k(k[-6:])))
    plain = divergence(target, linear_weights(elu_plus_one(q[-6:]), elu_plus_one(k[-6:])))
    assert sum(losses[-20:]) < sum(losses[:20])
    assert mimicked < 0.5 * plain


def spiky(attention: AttentionMixer) -> AttentionMixer:
    for layer in (attention.to_q, attention.to_k):
        layer.weight.data *= 2
    return attention


def test_a_linearised_layer_says_what_its_attention_says() -> None:
    attention = spiky(row("flash_attention").mixer(32, heads=2)).requires_grad_(False)
    mixer, x = linearised(attention), torch.randn(24, 48, 32)
    frozen = {name: p.clone() for name, p in mixer.named_parameters() if not name.startswith("maps")}
    q, k, _ = attention.project(x, x)
    before = (mixer(x) - attention(x)).square().mean()
    mimic(mixer.maps, cycle(q, k, 250))
    after = (mixer(x) - attention(x)).square().mean()
    assert after < 0.7 * before
    for name, parameter in mixer.named_parameters():
        if name in frozen:
            assert_close(parameter, frozen[name], rtol=0, atol=0)
    with torch.no_grad():
        out, _ = decoded(mixer, x[:2], mixer.init_state(2))
        assert_close(out, mixer(x[:2]), rtol=1e-4, atol=1e-4)


def test_only_plain_attention_is_linearised() -> None:
    with pytest.raises(ValueError, match="plain attention"):
        linearised(row("mswa").mixer(32, heads=4))


@pytest.mark.parametrize("weights", [softmax_weights, linear_weights])
def test_weights_are_shares_of_visible_keys(weights: Callable[..., Tensor]) -> None:
    q, k = torch.rand(2, 4, 9, 5), torch.rand(2, 2, 9, 5)
    for see_all in (True, False):
        shares = weights(q, k, causal=not see_all)
        assert_close(shares.sum(-1), torch.ones(2, 4, 9))
        assert bool((shares.triu(1) == 0).all()) != see_all
    assert_close(weights(q, k) @ torch.ones(2, 4, 9, 1), torch.ones(2, 4, 9, 1))


def test_softmax_weights_are_those_of_attention() -> None:
    q, k, v = torch.randn(1, 4, 9, 5), torch.randn(1, 2, 9, 5), torch.randn(1, 2, 9, 5)
    expected = PatternCore()(q, k, v, within=causal)
    assert_close(softmax_weights(q, k) @ v.repeat_interleave(2, 1), expected)
