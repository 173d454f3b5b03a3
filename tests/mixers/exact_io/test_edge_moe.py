"""Edge-MoE: a pass key by key with a running greatest logit, its stated error, and experts on sorted tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import agree
from tests.support.masked import masked
from torch import Tensor

from foveate import causal, full
from foveate.catalogue.registry import mixer
from foveate.layers.experts import SortedExperts
from foveate.mixers.exact_io.edge_moe import SinglePassCore


def key_by_key(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """One head (N, D): each logit is looked at once; a greater one takes the sums down."""
    outs = []
    for i in range(len(q)):
        best, total, acc = torch.tensor(-math.inf, dtype=q.dtype), 0.0, torch.zeros_like(v[0])
        for j in range(i + 1 + len(k) - len(q) if is_causal else len(k)):
            logit = q[i] @ k[j] / math.sqrt(q.shape[1])
            if logit > best:
                shrunk = (best - logit).exp()
                total, acc, best = total * shrunk + 1, acc * shrunk + v[j], logit
            else:
                weight = (logit - best).exp()
                total, acc = total + weight, acc + weight * v[j]
        outs.append(acc / total)
    return torch.stack(outs)


@pytest.mark.paper("Edge-MoE", "definition")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_one_pass_with_a_running_greatest_logit(block: int, is_causal: bool) -> None:
    made = mixer("edge_moe", 12, heads=3, kv_heads=1, block=block, causal=is_causal).double()
    x = (2 * torch.randn(2, 11, 12, dtype=torch.float64)).requires_grad_()
    for spread in (0.0, 0.7):
        for parameter in made.parameters():
            parameter.data += spread * torch.randn_like(parameter)
        q = (x @ made.to_q.weight.T).view(2, 11, 3, 4)
        k, v = ((x @ layer.weight.T).view(2, 11, 4) for layer in (made.to_k, made.to_v))
        rows = [torch.cat([key_by_key(q[b, :, h], k[b], v[b], is_causal) for h in range(3)], 1) for b in range(2)]
        agree(made(x), torch.stack(rows) @ made.to_out.weight.T, x, made)


def hard_inputs(kind: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that ascend, so that every key takes the sums down; that descend; large ones; equal ones."""
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))
    if kind in ("ascending", "descending"):
        q, k = torch.ones_like(q), torch.linspace(-3, 3, length, dtype=torch.float64).view(1, 1, -1, 1) * torch.ones(8)
        k = k.expand_as(v) if kind == "ascending" else -k.expand_as(v)
    return (20 * q if kind == "large" else 0 * q if kind == "equal" else q), k, v


KINDS = ("random", "ascending", "descending", "large", "equal")


@pytest.mark.paper("Edge-MoE", "works_when")
@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision_it_errs_no_more_than_plain_softmax(kind: str) -> None:
    q, k, v = hard_inputs(kind, 197)
    for within in (causal, full):
        seen = torch.ones(197, 197, dtype=torch.bool)
        seen = seen.tril() if within == causal else seen
        exact = masked(q, k, v, seen)
        plain = (masked(q.float(), k.float(), v.float(), seen).double() - exact).abs().max()
        for block in (1, 64):
            own = SinglePassCore(block)(q.float(), k.float(), v.float(), within=within).double()
            assert (own - exact).abs().max() <= 4 * plain + 1e-6


@pytest.mark.paper("Edge-MoE", "works_when")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [10, 16, 22])
def test_in_fixed_point_it_errs_no_more_than_it_states(kind: str, bits: int) -> None:
    q, k, v = hard_inputs(kind, 61)
    exact = masked(q, k, v, torch.ones(61, 61, dtype=torch.bool))
    for block in (1, 16):
        own = SinglePassCore(block, fraction_bits=bits)(q, k, v)
        error = float((own - exact).abs().max())
        assert error <= 3 * 62 * 2.0**-bits * float(v.abs().max())
        assert kind != "random" or error > 0.01 * 2.0**-bits  # numbers are rounded indeed
    torch.testing.assert_close(SinglePassCore(16, 40)(q, k, v), exact, rtol=1e-9, atol=1e-9)


def experts_by_hand(layer: SortedExperts, x: Tensor, task: int) -> Tensor:
    """Token by token, its experts one after the other."""
    outs = []
    for token in x.flatten(0, -2):
        gates = (layer.gates[task].weight @ token).softmax(0)
        out = torch.zeros_like(token)
        for expert in sorted(range(len(gates)), key=lambda e, gates=gates: -float(gates[e].detach()))[: layer.chosen]:
            first, second = layer.first[expert], layer.second[expert]
            h = first.weight @ token + first.bias
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
            out = out + gates[expert] * (second.weight @ h + second.bias)
        outs.append(out)
    return torch.stack(outs).view_as(x)


@pytest.mark.paper("Edge-MoE", "definition")
@pytest.mark.paper("Edge-MoE", "works_when")
@pytest.mark.parametrize(("experts", "chosen", "task"), [(5, 2, 0), (1, 1, 1), (7, 7, 1), (40, 1, 0)])
def test_experts_on_sorted_tokens_give_each_token_what_its_experts_do(experts: int, chosen: int, task: int) -> None:
    layer = SortedExperts(6, hidden=9, experts=experts, chosen=chosen, tasks=2).double()
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    for spread in (0.0, 0.5):
        for parameter in layer.parameters():
            parameter.data += spread * torch.randn_like(parameter)
        agree(layer(x, task), experts_by_hand(layer, x, task), x, layer)


@pytest.mark.paper("Edge-MoE", "works_when")
def test_each_expert_runs_once_on_its_tokens_side_by_side_in_their_order() -> None:
    layer = SortedExperts(4, hidden=3, experts=6, chosen=2)
    seen: dict[int, Tensor] = {}
    for number, first in enumerate(layer.first):

        def note(_: object, args: tuple[Tensor, ...], number: int = number) -> None:
            assert number not in seen
            seen[number] = args[0]

        first.register_forward_pre_hook(note)
    x = torch.randn(3, 7, 4)
    layer(x)
    tokens = x.flatten(0, 1)
    best = (tokens @ layer.gates[0].weight.T).topk(2).indices
    for expert in range(6):
        wanted = tokens[(best == expert).any(1)]
        assert torch.equal(seen[expert], wanted) if len(wanted) else expert not in seen


def test_experts_without_tokens_and_wrong_sizes() -> None:
    layer = SortedExperts(4, hidden=3, experts=2, chosen=1)
    assert layer(torch.zeros(2, 0, 4)).shape == (2, 0, 4)
    with pytest.raises(ValueError, match="tasks 0 to 0; got 1"):
        layer(torch.zeros(1, 4), task=1)
    with pytest.raises(ValueError, match="2 experts, 3 chosen"):
        SortedExperts(4, hidden=3, experts=2, chosen=3)
    with pytest.raises(ValueError, match="fraction_bits"):
        SinglePassCore(4, 0)
    with pytest.raises(ValueError, match="plain softmax"):
        q = torch.zeros(1, 1, 2, 4)
        SinglePassCore()(q, q, q, softcap=2.0)
