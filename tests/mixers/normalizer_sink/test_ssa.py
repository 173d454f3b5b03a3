"""SSA: temperatures of queries and scales of values, against the formula written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate import attend, causal, explain
from foveate.catalogue.registry import mixer

DIM, HEADS, GROUPS, WIDTH = 12, 4, 2, 3


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def formula(ssa: torch.nn.Module, x: Tensor, *, is_causal: bool = True) -> Tensor:
    """Loops over batch, tokens and heads: softmax(κ q k / √d) over values scaled one by one."""
    batch, length, _ = x.shape
    weights = [layer.weight for layer in (ssa.to_q, ssa.to_k, ssa.to_v)]
    q = (x @ weights[0].T).view(batch, length, HEADS, WIDTH)
    k, v = ((x @ w.T).view(batch, length, GROUPS, WIDTH) for w in weights[1:])
    slope = torch.exp(-torch.exp(ssa.beta))
    rows = []
    for b in range(batch):
        for i in range(length):
            seen = i + 1 if is_causal else length
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                kappa = 1 + torch.tanh((ssa.of_query[h] * gelu(q[b, i, h])).sum()) + slope * math.log(seen)
                logits = kappa * (k[b, :seen, g] @ q[b, i, h]) / math.sqrt(WIDTH)
                scales = 1 + torch.tanh(gelu(v[b, :seen, g]) @ ssa.of_value[g])
                rows.append(torch.softmax(logits, 0) @ (scales.unsqueeze(1) * v[b, :seen, g]))
    return torch.stack(rows).view(batch, length, DIM) @ ssa.to_out.weight.T


def made(**options: object) -> torch.nn.Module:
    return mixer("ssa", DIM, heads=HEADS, kv_heads=GROUPS, **options).double()


@pytest.mark.paper("SSA (Selective Self-Attention)", "definition")
@pytest.mark.parametrize("is_causal", [True, False])
def test_it_is_its_formula_at_first_and_at_random_parameters(is_causal: bool) -> None:
    ssa = made(causal=is_causal)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    follows(ssa, lambda: ssa(x), lambda: formula(ssa, x, is_causal=is_causal), x)


@pytest.mark.paper("SSA (Selective Self-Attention)", "definition")
def test_at_first_only_the_position_counts_as_much_as_the_published_code_lets_it() -> None:
    ssa = made()
    assert not ssa.of_query.any()
    assert not ssa.of_value.any()
    assert float(ssa.beta.detach()) == 1.5
    new = sum(p.numel() for name, p in ssa.named_parameters() if not name.startswith("to_"))
    assert new == HEADS * WIDTH + GROUPS * WIDTH + 1  # of 4 C² in a layer: below half a percent from C = 100 on


@pytest.mark.paper("SSA (Selective Self-Attention)", "works_when")
def test_decoding_counts_on_from_the_prompt() -> None:
    ssa, x = made(), torch.randn(2, 11, DIM, dtype=torch.float64)
    with torch.no_grad():
        for parameter in ssa.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected = formula(ssa, x)
        first, state = ssa.prefill(x[:, :5], ssa.init_state(2))
        outs = [first]
        for t in range(5, 11):
            out, state = ssa.decode(x[:, t : t + 1], state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("SSA (Selective Self-Attention)", "works_when")
def test_with_kappa_one_it_is_the_original_model_bit_for_bit() -> None:
    plain = mixer("flash_attention", DIM, heads=HEADS, kv_heads=GROUPS)
    x = torch.randn(2, 33, DIM)
    off = mixer("ssa", DIM, heads=HEADS, kv_heads=GROUPS, token=False, position=False, values=False)
    off.load_state_dict(plain.state_dict())
    assert torch.equal(off(x), plain(x))
    untrained = mixer("ssa", DIM, heads=HEADS, kv_heads=GROUPS, position=False)  # its functions begin at 0
    untrained.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(untrained(x), plain(x))


@pytest.mark.paper("SSA (Selective Self-Attention)", "works_when")
def test_every_backend_takes_a_scale_of_each_query_head_and_of_each_value() -> None:
    q, k, v = (torch.randn(2, heads, 37, 8) for heads in (4, 2, 2))
    kappa, scales = torch.rand(2, 4, 37) + 0.5, torch.rand(2, 2, 37) + 0.5
    inputs = [x.requires_grad_() for x in (q, k, v, kappa, scales)]
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, scales.unsqueeze(-1) * v))
    logits = kappa.double().unsqueeze(-1) * (q.double() @ keys.mT) / math.sqrt(8)
    hidden = torch.ones(37, 37, dtype=torch.bool).triu(1)
    dense = logits.masked_fill(hidden, -math.inf).softmax(-1) @ values
    towards = torch.randn_like(dense)
    wanted = torch.autograd.grad((dense * towards).sum(), inputs)
    able = [name for name, reason in explain(q, k, v, causal, scale=kappa).reasons.items() if reason is None]
    assert {"sdpa", "tiles", "reference"} <= set(able)
    for impl in able:
        out = attend(q, k, scales.unsqueeze(-1) * v, causal, scale=kappa * 8**-0.5, impl=impl)
        torch.testing.assert_close(out.double(), dense, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad((out * towards.float()).sum(), inputs)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
