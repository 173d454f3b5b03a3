"""CoCA: keys made for each query, turned plane by plane, against the mixer that never forms them."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.counted_work import largest
from tests.support.formulas import follows
from torch import Tensor

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

DIM, HEADS, GROUPS, WIDTH = 24, 4, 2, 6
HALF = WIDTH // 2


def turned(x: Tensor, at: float, base: float) -> Tensor:
    """x (D,) with channels (c, c + D / 2) turned by at · base^(-2c / D)."""
    out = []
    for c in range(HALF):
        angle = at * base ** (-2 * c / WIDTH)
        out.append(
            (
                x[c] * math.cos(angle) - x[c + HALF] * math.sin(angle),
                x[c + HALF] * math.cos(angle) + x[c] * math.sin(angle),
            )
        )
    return torch.stack([first for first, _ in out] + [second for _, second in out])


def formula(
    layer: torch.nn.Module, x: Tensor, *, base: float = 10_000.0, stretch: float = 1.0, is_causal: bool = True
) -> Tensor:
    """The paper's: K[m, n] = q_m ⊙ t_n explicitly, turned by n, and q_m by m."""
    batch, length, _ = x.shape
    q = (x @ layer.to_q.weight.T).view(batch, length, HEADS, WIDTH)
    t, v = ((x @ w.weight.T).view(batch, length, GROUPS, WIDTH) for w in (layer.to_k, layer.to_v))
    t = torch.relu((t[..., :HALF] + t[..., HALF:]) / 2)
    t = torch.cat([t, t], -1)
    rows = []
    for b in range(batch):
        for m in range(length):
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                seen = range(m + 1 if is_causal else length)
                own = turned(q[b, m, h], m / stretch, base)
                logits = [own @ turned(q[b, m, h] * t[b, n, g], n / stretch, base) / math.sqrt(WIDTH) for n in seen]
                rows.append(torch.stack(logits).softmax(0) @ v[b, : len(seen), g])
    return torch.stack(rows).view(batch, length, -1) @ layer.to_out.weight.T


def made(**options: object) -> torch.nn.Module:
    return mixer("coca", DIM, heads=HEADS, kv_heads=GROUPS, **options).double()


@pytest.mark.paper("CoCA", "definition")
@pytest.mark.paper("CoCA", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_it_is_attention_to_the_explicit_keys(is_causal: bool) -> None:
    layer = made(causal=is_causal)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    follows(layer, lambda: layer(x), lambda: formula(layer, x, is_causal=is_causal), x)


@pytest.mark.paper("CoCA", "works_when")
def test_no_tensor_of_queries_by_keys_by_channels_is_formed() -> None:
    layer, length = mixer("coca", 32, heads=4), 300
    assert largest(lambda: layer(torch.randn(1, length, 32))) < length * length
    with count_operations() as counted:
        layer(torch.randn(1, length, 32))
    assert counted.pairs == 4 * length * (length + 1) // 2


@pytest.mark.paper("CoCA", "works_when")
@pytest.mark.parametrize(
    ("options", "base", "stretch"),
    [
        ({}, 10_000.0, 1.0),
        ({"rotary": 500.0}, 500.0, 1.0),
        ({"scaling": "linear", "factor": 4.0}, 10_000.0, 4.0),
        ({"scaling": "ntk", "factor": 8.0}, 10_000.0 * 8.0 ** (6 / 4), 1.0),
    ],
)
def test_cached_decoding_equals_the_whole_with_every_scaling(options: dict, base: float, stretch: float) -> None:
    layer, x = made(**options), torch.randn(2, 9, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = formula(layer, x, base=base, stretch=stretch)
        first, state = layer.prefill(x[:, :4], layer.init_state(2))
        outs = [first]
        for t in range(4, 9):
            out, state = layer.decode(x[:, t : t + 1], state)
            outs.append(out)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("CoCA", "works_when")
def test_each_planes_logit_is_greatest_at_distance_zero() -> None:
    """One key at every place, and queries at one: all but one plane of the projections are cut out."""
    length = 41
    for plane in range(HALF):
        layer = made(causal=False)
        kept = torch.zeros(HEADS, WIDTH, 1, dtype=torch.float64)
        kept[:, [plane, plane + HALF]] = 1
        with torch.no_grad():
            layer.to_q.weight.mul_(kept.view(-1, 1))
            layer.to_k.weight.mul_(kept[:GROUPS].view(-1, 1))
        token = torch.randn(1, 1, DIM, dtype=torch.float64).expand(1, length, DIM)
        q, k, _ = layer.project(token, token)
        logits = (q @ k.repeat_interleave(2, 1).mT)[0]
        own = logits.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        assert (logits <= own + 1e-12).all()
        angles = torch.arange(length) * 10_000.0 ** (-2 * plane / WIDTH)
        torch.testing.assert_close(logits[:, 0], own[:, 0] * angles.double().cos())


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="two channels"):
        mixer("coca", 9, heads=3)
    with pytest.raises(ValueError, match="scaling"):
        made(scaling="yarn", factor=2.0)
    with pytest.raises(ValueError, match="factor"):
        made(factor=2.0)
    with pytest.raises(ValueError, match="factor"):
        made(scaling="ntk", factor=0.5)
