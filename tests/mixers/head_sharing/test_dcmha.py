"""DCMHA: heads composed for every pair, against loops over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate.attention.composed import Composition, Factors, attend_composed
from foveate.catalogue.registry import mixer

DIM, HEADS, GROUPS, WIDTH, RANK = 12, 4, 2, 3, 2


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mixing(layer: torch.nn.Module, token: Tensor, side: int) -> Tensor:
    """The (H, H) matrix that a token adds on one of four sides: heads in, heads out."""
    hidden = gelu(token @ layer.hidden[side])
    made = torch.einsum("k,krh->rh", hidden, layer.factors[side])
    read, write = made[:RANK], made[RANK:]
    matrix = torch.diag(torch.tanh(token @ layer.gates[side]))
    for one, other in zip(read, write, strict=True):
        matrix = matrix + torch.outer(one / torch.sqrt((one**2).sum() / HEADS + 1e-6), other)
    return matrix


def formula(layer: torch.nn.Module, x: Tensor, *, is_causal: bool = True) -> Tensor:
    batch, length, _ = x.shape
    q = (x @ layer.to_q.weight.T).view(batch, length, HEADS, WIDTH)
    k, v = ((x @ w.weight.T).view(batch, length, GROUPS, WIDTH) for w in (layer.to_k, layer.to_v))
    k, v = (y.repeat_interleave(HEADS // GROUPS, dim=2) for y in (k, v))
    base = torch.zeros(2, HEADS, HEADS, dtype=x.dtype) if layer.base is None else layer.base
    own = torch.eye(HEADS, dtype=x.dtype)
    rows = []
    for b in range(batch):
        for i in range(length):
            seen = range(i + 1 if is_causal else length)
            before = [own + base[0] + mixing(layer, x[b, i], 0) + mixing(layer, x[b, j], 1) for j in seen]
            after = [own + base[1] + mixing(layer, x[b, i], 2) + mixing(layer, x[b, j], 3) for j in seen]
            logits = [(q[b, i] * k[b, j]).sum(-1) / math.sqrt(WIDTH) @ before[j] for j in seen]
            weights = torch.stack(logits).softmax(0)
            mixed = [weights[j] @ after[j] for j in seen]
            rows.append(sum(mixed[j].unsqueeze(1) * v[b, j] for j in seen).flatten())
    return torch.stack(rows).view(batch, length, DIM) @ layer.to_out.weight.T


def made(**options: object) -> torch.nn.Module:
    return mixer("dcmha", DIM, heads=HEADS, kv_heads=GROUPS, rank=RANK, **options).double()


def strong(layer: torch.nn.Module) -> torch.nn.Module:
    """At first the parameters leave heads almost alone; here they mix them."""
    with torch.no_grad():
        for parameter in (layer.factors, layer.gates, layer.base):
            if parameter is not None:
                parameter.add_(0.4 * torch.randn_like(parameter))
    return layer


@pytest.mark.paper("DCMHA", "definition")
@pytest.mark.paper("DCMHA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_it_is_its_formula_forward_and_backward(is_causal: bool, static: bool) -> None:
    x = torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)
    layer = made(causal=is_causal, static=static)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, is_causal=is_causal), x)
    strong(layer)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, is_causal=is_causal), x)


@pytest.mark.paper("DCMHA", "definition")
def test_it_begins_as_published() -> None:
    layer = mixer("dcmha", 64, heads=8)
    assert layer.base is None
    assert layer.hidden.shape == (4, 64, 32)
    for parameter, spread in (
        (layer.hidden, math.sqrt(2 / 96)),
        (layer.factors, 0.02 / (math.sqrt(32) * 10)),
        (layer.gates, 0.05 * math.sqrt(2 / 72)),
    ):
        assert abs(float(parameter.detach().std()) / spread - 1) < 0.2
    assert not mixer("dcmha", 64, heads=8, static=True).base.any()


@pytest.mark.paper("DCMHA", "works_when")
def test_with_the_identity_for_a_map_it_is_multi_head_attention() -> None:
    layer, plain = made(static=True), mixer("flash_attention", DIM, heads=HEADS, kv_heads=GROUPS).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 19, DIM, dtype=torch.float64)
    assert (layer(x) - plain(x)).abs().max() > 1e-6
    with torch.no_grad():
        layer.factors.zero_()
        layer.gates.zero_()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.paper("DCMHA", "works_when")
def test_cached_decoding_equals_the_whole_sequence() -> None:
    layer, x = strong(made(static=True)), torch.randn(2, 9, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = formula(layer, x)
        first, state = layer.prefill(x[:, :4], layer.init_state(2))
        outs = [first]
        for t in range(4, 9):
            out, state = layer.decode(x[:, t : t + 1], state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-10)


def test_chunks_of_queries_change_nothing() -> None:
    q, k, v = torch.randn(3, 1, 4, 11, 3, dtype=torch.float64).unbind(0)
    read, write = torch.randn(2, 1, 11, 2, 4, dtype=torch.float64).unbind(0)
    some = Factors(read, write, torch.randn(1, 11, 4, dtype=torch.float64))
    both = Composition(some, some)
    whole = attend_composed(q, k, v, before=both, after=both)
    torch.testing.assert_close(attend_composed(q, k, v, before=both, after=both, chunk=3), whole)
    with pytest.raises(ValueError, match=r"before\.key"):
        attend_composed(q, k[:, :, 1:], v[:, :, 1:], before=both, after=both)
    with pytest.raises(ValueError, match="chunk"):
        attend_composed(q, k, v, before=both, after=both, chunk=0)
    with pytest.raises(ValueError, match="rank"):
        mixer("dcmha", 8, heads=2, rank=0)
