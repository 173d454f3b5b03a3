"""Sigmoid attention against its formula, tiled and whole."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.counted_work import largest
from tests.support.formulas import follows
from tests.support.heads import agree, heads, qkv
from tests.support.linear_text import standard
from torch import Tensor

from foveate import alibi, attend, causal, sigmoid
from foveate.catalogue.registry import mixer
from foveate.mixers.base import split_heads
from foveate.patterns import full, sinks


@pytest.mark.paper("Sigmoid-Attention", "definition")
@pytest.mark.parametrize(("length", "slanted", "kv_heads"), [(None, False, 4), (100, False, 2), (None, True, 2)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sigmoid_attention_is_its_formula(length: int | None, slanted: bool, kv_heads: int, is_causal: bool) -> None:
    options = {"kv_heads": kv_heads, "length": length, "alibi": slanted, "qk_norm": True, "causal": is_causal}
    model, x = mixer("sigmoid_attention", 32, heads=4, **options).double(), heads(2, 21, 32)
    real = torch.arange(21).expand(2, -1) < torch.tensor([[21], [13]])
    seen = real[:, None, None] & (torch.ones(21, 21).tril().bool() if is_causal else torch.ones(21, 21).bool())
    count = seen.sum(-1, keepdim=True) if length is None else torch.tensor(length)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]).double().view(4, 1, 1) * slanted
    age = (torch.arange(21).unsqueeze(1) - torch.arange(21)).abs()

    def formula() -> Tensor:
        q, k, v = (
            split_heads(layer(x), n) for layer, n in ((model.to_q, 4), (model.to_k, kv_heads), (model.to_v, kv_heads))
        )
        q, k = (
            standard(q) * model.norm_q.weight + model.norm_q.bias,
            standard(k) * model.norm_k.weight + model.norm_k.bias,
        )
        k, v = (y.repeat_interleave(4 // kv_heads, 1) for y in (k, v))
        weights = torch.sigmoid(q @ k.mT / math.sqrt(8) - slopes * age - count.double().log()) * seen
        return model.to_out((weights @ v).transpose(1, 2).flatten(2)) * real.unsqueeze(-1)

    follows(model, lambda: model(x, padding=real), formula, x)


def test_norm_and_scale_follow_attention_in_reading_and_in_decoding() -> None:
    plain, x = mixer("sigmoid_attention", 32, heads=4).double(), heads(2, 13, 32)
    tamed = mixer("sigmoid_attention", 32, heads=4, hybrid_norm=True, layer_scale=1e-4).double()
    assert tamed.layer_scale.tolist() == pytest.approx([1e-4] * 32)
    plain.to_q, plain.to_k, plain.to_v, plain.to_out = tamed.to_q, tamed.to_k, tamed.to_v, tamed.to_out

    def formula() -> Tensor:
        return (standard(plain(x)) * tamed.norm_out.weight + tamed.norm_out.bias) * tamed.layer_scale

    follows(tamed, lambda: tamed(x), formula, x)
    state, outs = tamed.init_state(2), []
    for token in x.split(1, dim=1):
        out, state = tamed.decode(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), formula())


@pytest.mark.paper("Sigmoid-Attention", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_tiled_sigmoid_attention_is_dense(is_causal: bool) -> None:
    n, within = 300, causal if is_causal else full
    q, k, v = qkv(n)
    slopes, ages = torch.tensor([0.5, 0.25, 0.1, 0.01]).double(), torch.arange(n).unsqueeze(1) - torch.arange(n)
    keys, values = (y.repeat_interleave(2, 1) for y in (k, v))
    logits = q @ keys.mT / math.sqrt(8) - slopes.view(4, 1, 1) * ages.abs() - math.log(n)
    weights = torch.sigmoid(logits)
    expected = (weights.tril() if is_causal else weights) @ values
    options = {"bias": alibi(slopes), "weights": sigmoid(bias=-math.log(n))}
    agree(attend(q, k, v, within, **options), expected, q, k, v)
    past, rest = sinks(130), ~sinks(130)  # of the keys, two parts that share none
    parts = [attend(q, k, v, within & part, **options) for part in (past, rest)]
    torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.paper("Sigmoid-Attention", "works_when")
def test_sigmoid_attention_holds_no_matrix_of_all_pairs() -> None:
    model, n = mixer("sigmoid_attention", 32, heads=2, length=100), 3000
    x = torch.randn(1, n, 32, requires_grad=True)
    assert largest(lambda: model(x)) < n**2 // 8  # forward and backward
