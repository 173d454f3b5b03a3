"""MoH: all heads computed and multiplied by masked gates is what the mixture must equal, without computing them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tests.support.formulas import agree, follows
from torch import Tensor

from foveate import attend, causal
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.head_sharing.mixture import MixtureOfHeads, queries_asked

DIM, HEADS, GROUPS, WIDTH, SHARED, CHOSEN = 20, 5, 1, 4, 2, 2
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def gates_of(layer: torch.nn.Module, token: Tensor) -> Tensor:
    """Of one token: shared heads, then the routed ones, those not among the best 0."""
    shared = SHARED * torch.softmax(layer.to_shared.weight @ token, 0)
    scores = torch.softmax(layer.to_routed.weight @ token, 0)
    best = sorted(range(HEADS - SHARED), key=lambda h: -float(scores[h].detach()))[:CHOSEN]
    routed = [
        scores[h] / sum(scores[c] for c in best) * CHOSEN if h in best else scores.new_zeros(()) for h in range(3)
    ]
    balance = 2 * torch.softmax(layer.to_groups.weight @ token, 0)
    return torch.cat([balance[0] * shared, balance[1] * torch.stack(routed)])


def all_heads(layer: torch.nn.Module, x: Tensor, *, is_causal: bool = True) -> Tensor:
    """Every head of every token, (B, N, H, D), dense."""
    batch, length, _ = x.shape
    q = (x @ layer.to_q.weight.T).view(batch, length, -1, WIDTH)
    k, v = ((x @ w.weight.T).view(batch, length, -1, WIDTH) for w in (layer.to_k, layer.to_v))
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(WIDTH)
    if is_causal:
        logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


def formula(layer: torch.nn.Module, x: Tensor, *, is_causal: bool = True) -> Tensor:
    gates = torch.stack([torch.stack([gates_of(layer, token) for token in tokens]) for tokens in x])
    return (gates.unsqueeze(-1) * all_heads(layer, x, is_causal=is_causal)).flatten(2) @ layer.to_out.weight.T


def made(**options: object) -> torch.nn.Module:
    sizes = {"heads": HEADS, "kv_heads": GROUPS, "shared": SHARED, "chosen": CHOSEN}
    return mixer("moh", DIM, **{**sizes, **options}).double()


@pytest.mark.paper("MoH", "definition")
@pytest.mark.paper("MoH", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_it_is_all_heads_times_masked_gates_with_gradients(is_causal: bool) -> None:
    layer = made(causal=is_causal)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, is_causal=is_causal), x)


@pytest.mark.paper("MoH", "definition")
def test_decoding_routes_each_token_alone() -> None:
    layer, x = made(), torch.randn(2, 9, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = formula(layer, x)
        first, state = layer.prefill(x[:, :4], layer.init_state(2))
        outs = [first]
        for t in range(4, 9):
            out, state = layer.decode(x[:, t : t + 1], state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("MoH", "works_when")
def test_the_load_balance_loss_is_the_papers() -> None:
    layer, x = made(), torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    tokens = x.flatten(0, 1)
    scores = (tokens @ layer.to_routed.weight.T).softmax(-1)
    routed = HEADS - SHARED
    asked = torch.stack([torch.bincount(row.topk(CHOSEN).indices, minlength=routed) for row in scores])
    expected = sum(scores[:, h].mean() * asked[:, h].double().mean() for h in range(routed)) * routed
    agree(layer.routing(x).balance, expected, x, layer)
    with torch.no_grad():
        layer.to_routed.weight.zero_()
    assert abs(float(layer.routing(x).balance.detach()) - CHOSEN) < 1e-12  # the least there is
    assert made(chosen=0).routing(x).balance is None


@pytest.mark.paper("MoH", "works_when")
def test_without_routed_or_without_shared_heads_the_groups_are_not_weighed() -> None:
    x = torch.randn(1, 7, DIM, dtype=torch.float64)
    none = made(shared=5, chosen=0)
    gates = 5 * (x @ none.to_shared.weight.T).softmax(-1)
    expected = (gates.unsqueeze(-1) * all_heads(none, x)).flatten(2) @ none.to_out.weight.T
    torch.testing.assert_close(none(x), expected)
    one = made(shared=1, chosen=4)
    groups = 2 * (x @ one.to_groups.weight.T).softmax(-1)
    routed = 4 * (x @ one.to_routed.weight.T).softmax(-1)
    gates = torch.cat([groups[..., :1], groups[..., 1:] * routed], -1)
    torch.testing.assert_close(one(x), (gates.unsqueeze(-1) * all_heads(one, x)).flatten(2) @ one.to_out.weight.T)
    only = made(shared=0, chosen=5)
    gates = 5 * (x @ only.to_routed.weight.T).softmax(-1)
    torch.testing.assert_close(only(x), (gates.unsqueeze(-1) * all_heads(only, x)).flatten(2) @ only.to_out.weight.T)


@pytest.mark.paper("MoH", "works_when")
def test_pairs_of_heads_that_are_not_asked_are_not_attended() -> None:
    heads, length = 8, 640
    q, k, v = torch.randn(3, 1, heads, length, 16).unbind(0)
    chosen = torch.zeros(1, length, heads, dtype=torch.bool)
    chosen.scatter_(-1, torch.rand(1, length, heads).topk(2, dim=-1).indices, True)
    with count_operations() as some:
        out = attend(q, k, v, queries_asked(chosen, length) & causal)
    with count_operations() as every:
        whole = attend(q, k, v, causal)
    rows = torch.arange(1, length + 1).view(1, -1, 1)
    assert some.pairs == int((chosen * rows).sum())
    assert every.pairs == heads * length * (length + 1) // 2
    asked = chosen.transpose(1, 2)
    torch.testing.assert_close(out[asked], whole[asked], rtol=1e-4, atol=1e-5)
    assert not out[~asked].any()


@pytest.mark.paper("MoH", "works_when")
def test_it_was_measured_faster_than_all_heads() -> None:
    cases = json.loads((RESULTS / "mixture_of_heads.json").read_text(encoding="utf-8"))["cases"]
    long = [case for case in cases if case["tokens"] >= 8192]
    assert {(case["asked"], case["task"]) for case in long} >= {(6, "forward"), (4, "forward + backward")}
    for case in long:
        saved = 1 - case["seconds"]["some"] / case["seconds"]["all"]
        assert saved > 0.4 * (1 - case["asked"] / case["heads"])  # of what is skipped, at least that much is time


@pytest.mark.paper("MoH", "works_when")
def test_a_llama_layer_converts_and_with_all_heads_computes_what_it_did() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=40, num_attention_heads=5, num_key_value_heads=1, attn_implementation="eager")
    llama, length = LlamaAttention(config, 0).double(), 11
    x = torch.randn(2, length, 40, dtype=torch.float64)
    mask = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1).expand(2, 1, -1, -1)
    turns = LlamaRotaryEmbedding(config)(x, torch.arange(length).unsqueeze(0))
    expected = llama(x, position_embeddings=turns, attention_mask=mask)[0]
    layers = (llama.q_proj, llama.k_proj, llama.v_proj, llama.o_proj)
    options = {"heads": 5, "rotary": 10_000.0, "router": "norm", "shared": 2}
    everything = MixtureOfHeads.of(*layers, chosen=3, **options)
    torch.testing.assert_close(everything(x), expected, rtol=1e-6, atol=1e-6)
    some = MixtureOfHeads.of(*layers, chosen=1, **options)
    norms = (x @ llama.q_proj.weight.T).view(2, length, 5, 8).norm(dim=-1)[..., 2:]
    wanted = torch.nn.functional.one_hot(norms.argmax(-1), 3).bool()
    assert torch.equal(some.routing(x).chosen, torch.cat([torch.ones(2, length, 2, dtype=torch.bool), wanted], -1))
    assert set(some.routing(x).gates.flatten().tolist()) == {0.0, 1.0}
    some(x).square().sum().backward()
    assert some.to_q.weight.grad.abs().max() > 0


def test_norms_pass_the_gradient_of_their_softmax_straight_through() -> None:
    layer = MixtureOfHeads(12, heads=4, shared=1, chosen=1, router="norm").double()
    x = torch.randn(1, 3, 12, dtype=torch.float64)
    gates = layer.routing(x).gates[..., 1:]
    norms = (x @ layer.to_q.weight.T).view(1, 3, 4, 3).norm(dim=-1)[..., 1:]
    soft = (norms / norms.std(-1, keepdim=True)).softmax(-1) * gates.detach()
    towards = torch.randn_like(gates)
    found, expected = (torch.autograd.grad((y * towards).sum(), layer.to_q.weight)[0] for y in (gates, soft))
    torch.testing.assert_close(found, expected)


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="of 4 heads"):
        mixer("moh", 8, heads=4, shared=3, chosen=2)
    with pytest.raises(ValueError, match="of 4 heads"):
        mixer("moh", 8, heads=4, shared=0, chosen=0)
    with pytest.raises(ValueError, match="router"):
        mixer("moh", 8, heads=4, router="random")
    layer = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="biases"):
        MixtureOfHeads.of(layer, layer, layer, layer, heads=2)
