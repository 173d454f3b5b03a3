"""VAR: weights formed and moved one by one, against groups of keys merged by their log sums."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor

from foveate import causal
from foveate.attention import ATTEND
from foveate.catalogue.registry import mixer
from foveate.mixers.normalizer_sink.redistribution import Redistribution, redistribute, sink_tokens

DIM, HEADS, GROUPS, WIDTH = 12, 4, 2, 3
IMAGE, DIMS, TAU = (2, 8), (1, 4), 2.4


def moved(weights: Tensor, visual: set[int], sinks: set[int], p: float, rho: float, least: float) -> Tensor:
    """One row of weights (M,), as the authors' code changes it."""
    of_image = sum(weights[j] for j in visual)
    of_sinks = sum(weights[j] for j in visual & sinks) if visual & sinks else 0.0
    clear = visual - sinks
    if not visual & sinks or not clear or of_image < least or of_sinks > rho * of_image:
        return weights
    budget = (1 - p) * sum(weights[j] for j in sinks)
    others = sum(weights[j] for j in clear)
    changed = [p * w if j in sinks else w + budget * w / others if j in clear else w for j, w in enumerate(weights)]
    return torch.stack(changed)


def formula(layer: torch.nn.Module, x: Tensor, *, p: float = 0.6, rho: float = 0.5, least: float = 0.2) -> Tensor:
    batch, length, _ = x.shape
    q = (x @ layer.to_q.weight.T).view(batch, length, HEADS, WIDTH)
    k, v = ((x @ w.weight.T).view(batch, length, GROUPS, WIDTH) for w in (layer.to_k, layer.to_v))
    rows = []
    for b in range(batch):
        massive = [max(abs(float(x[b, j, d].detach())) for d in DIMS) for j in range(length)]
        rms = [math.sqrt(float(x[b, j].detach().square().mean()) + 1e-6) for j in range(length)]
        sinks = {j for j in range(length) if massive[j] / rms[j] > TAU}
        for i in range(length):
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                weights = torch.softmax(k[b, : i + 1, g] @ q[b, i, h] / math.sqrt(WIDTH), 0)
                if i >= IMAGE[1]:
                    seen = {j for j in range(*IMAGE) if j <= i}
                    weights = moved(weights, seen, {j for j in sinks if j <= i}, p, rho, least)
                assert abs(float(weights.sum().detach()) - 1) < 1e-12
                rows.append(weights @ v[b, : i + 1, g])
    return torch.stack(rows).view(batch, length, DIM) @ layer.to_out.weight.T


def made(**options: object) -> torch.nn.Module:
    sizes = {"image": IMAGE, "sink_dims": DIMS, "tau": TAU}
    return mixer("visual_redistribution", DIM, heads=HEADS, kv_heads=GROUPS, **sizes, **options).double()


def tokens(length: int = 13) -> Tensor:
    """Some tokens of the image, and one outside, have massive activations."""
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    x[0, [1, 3, 6], 4] = 6.0
    x[1, [0, 5], 1] = -7.0
    return x


@pytest.mark.paper("VAR", "definition")
@pytest.mark.paper("VAR", "works_when")
@pytest.mark.parametrize("how", [{}, {"p": 0.2, "rho": 0.4, "least": 0.3}, {"p": 0.0, "rho": 1.0, "least": 0.0}])
def test_it_is_the_published_rule_with_heads_selected_and_sums_of_one(how: dict[str, float]) -> None:
    layer, x = made(**how), tokens().requires_grad_()
    with torch.no_grad():
        plain = mixer("flash_attention", DIM, heads=HEADS, kv_heads=GROUPS).double()
        plain.load_state_dict(layer.state_dict())
        apart = (layer(x) - plain(x)).abs().amax((0, 2))
        assert not apart[: IMAGE[1]].gt(1e-12).any()  # the image's own rows, and those before it, stay
        assert apart[IMAGE[1] :].max() > 1e-6
    follows(layer, lambda: layer(x), lambda: formula(layer, x, **how), x, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("VAR", "works_when")
def test_sinks_are_where_a_dimension_is_massive() -> None:
    x = tokens()
    found = sink_tokens(x, DIMS, TAU)
    expected = (x[..., list(DIMS)].abs() / x.square().mean(-1, keepdim=True).sqrt()).amax(-1) > TAU
    assert torch.equal(found, expected)
    assert found[0, [1, 3, 6]].all()
    assert found[1, [0, 5]].all()
    hidden = torch.randn(1, 9, 4096)
    assert not sink_tokens(hidden, (2533, 1415)).any()
    hidden[0, 4, 2533] = 40.0
    assert sink_tokens(hidden, (2533, 1415))[0].tolist() == [n == 4 for n in range(9)]


@pytest.mark.paper("VAR", "works_when")
def test_cached_decoding_equals_the_whole() -> None:
    layer, x = made(), tokens()
    with torch.no_grad():
        expected = formula(layer, x)
        first, state = layer.prefill(x[:, :5], layer.init_state(2))  # in the midst of the image
        outs = [first]
        for t in range(5, 13):
            out, state = layer.decode(x[:, t : t + 1], state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.paper("VAR", "works_when")
def test_sets_of_the_user_on_every_implementation_that_gives_log_sums() -> None:
    """Weights are never formed: rescaling by the log sum of each group of keys is the same on all."""
    q, k, v = (torch.randn(2, heads, 70, 16) for heads in (4, 2, 2))
    visual = torch.arange(70).unsqueeze(0) // 30 == 0
    sinks = torch.rand(2, 70) < 0.2
    rows = torch.arange(70).unsqueeze(0) >= 30
    how = Redistribution(0.5, 0.6, 0.05)
    weights = (
        (q.double() @ k.double().repeat_interleave(2, 1).mT / 4)
        .masked_fill(torch.ones(70, 70, dtype=torch.bool).triu(1), -math.inf)
        .softmax(-1)
    )
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(30, 70)).tolist():
        taken = set(torch.nonzero(sinks[b, : i + 1]).flatten().tolist())
        weights[b, h, i] = moved(weights[b, h, i].clone(), set(range(30)), taken, *how)
    expected = weights @ v.double().repeat_interleave(2, 1)
    ran = 0
    for impl in ("native", "tiles", "reference"):
        if impl != "native" or ATTEND.takes("native", "auto"):
            out = redistribute(q, k, v, visual=visual, sinks=sinks, rows=rows, pattern=causal, how=how, impl=impl)
            torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
            ran += 1
    assert ran >= 2


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="first position"):
        mixer("visual_redistribution", 8, image=(5, 2))
    with pytest.raises(ValueError, match="below 8"):
        mixer("visual_redistribution", 8, sink_dims=(8,))
