"""Stochastically subsampled attention: what is drawn, what is computed of it, and what it saves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.support.formulas import agree
from tests.support.masked import masked_mixer
from torch import Tensor
from torch.testing import assert_close

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.static_sparse.subsampled import ensemble

N = 61


def model(**options: Any) -> Any:
    made: Any = mixer("subsampled_attention", 24, heads=4, **options).double()
    return made


def uniform(keep: float, causal: bool, length: int = N) -> Tensor:
    """Pairs that a query sees, by the draw that is documented: the first of a permutation."""
    drawn = torch.randperm(length)[: math.ceil(keep * length)].tolist()
    return torch.tensor([[j in drawn and (j <= i or not causal) for j in range(length)] for i in range(length)])


def local(window: int, spread: float, causal: bool, length: int = N) -> Tensor:
    """The same where keys are shuffled a little, and a query sees a window of places."""
    moved = (torch.arange(length) + spread * torch.randn(length)).tolist()
    place = {j: sum(other < moved[j] for other in moved) for j in range(length)}
    back, ahead = (window - 1, 0) if causal else (window // 2, (window - 1) // 2)
    return torch.tensor(
        [[-back <= place[j] - i <= ahead and (j <= i or not causal) for j in range(length)] for i in range(length)]
    )


FORMS: tuple[tuple[dict[str, Any], Any], ...] = (
    ({"keep": 0.25}, lambda causal: uniform(0.25, causal)),
    ({"keep": 0.5, "kv_heads": 2}, lambda causal: uniform(0.5, causal)),
    ({"window": 12}, lambda causal: local(12, 12.0, causal)),
    ({"window": 9, "spread": 3.0}, lambda causal: local(9, 3.0, causal)),
)


@pytest.mark.paper("SSA (Stochastically Subsampled Attention)", "definition")
@pytest.mark.paper("SSA (Stochastically Subsampled Attention)", "works_when")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("options", "seen"), FORMS)
def test_while_training_it_is_attention_to_the_keys_drawn(options: dict[str, Any], seen: Any, causal: bool) -> None:
    ssa, x = model(causal=causal, **options).train(), torch.randn(2, N, 24, dtype=torch.float64, requires_grad=True)
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = masked_mixer(ssa, x, seen(causal))
        torch.manual_seed(seed)
        agree(ssa(x), expected, x, ssa)
        with torch.no_grad():
            for parameter in ssa.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.paper("SSA (Stochastically Subsampled Attention)", "works_when")
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_in_eval_mode_it_is_dense(causal: bool) -> None:
    ssa, x = model(causal=causal).eval(), torch.randn(2, N, 24, dtype=torch.float64)
    seen = torch.ones(N, N, dtype=torch.bool)
    assert_close(ssa(x), masked_mixer(ssa, x, seen.tril() if causal else seen))
    assert torch.equal(ssa(x), ssa(x)) and not torch.equal(ssa.train()(x), ssa(x))
    if causal:
        first, state = ssa.prefill(x[:, :40], ssa.init_state(2))
        last = ssa.decode(x[:, 40:41], state).out
        assert_close(torch.cat([first, last], 1), ssa.eval()(x)[:, :41])


@pytest.mark.paper("SSA (Stochastically Subsampled Attention)", "works_when")
@torch.no_grad()
def test_work_is_in_proportion_to_the_keys_drawn() -> None:
    x = torch.randn(1, 400, 24, dtype=torch.float64)

    def pairs(**options: Any) -> int:
        torch.manual_seed(3)
        ssa = model(**options).train()
        torch.manual_seed(3)
        with count_operations() as counted:
            ssa(x)
        return counted.pairs

    for keep in (0.125, 0.25, 1.0):
        assert pairs(keep=keep, causal=False) == 4 * keep * 400**2
        assert pairs(keep=keep, causal=True) == 4 * uniform_after_seed(keep)
    assert 0.9 < pairs(window=50, causal=False) / (4 * 50 * 400) <= 1
    assert 0.3 < pairs(window=50, causal=True) / (4 * 50 * 400) <= 1


def uniform_after_seed(keep: float) -> int:
    torch.manual_seed(3)
    return int(uniform(keep, True, 400).sum())


@pytest.mark.paper("SSA (Stochastically Subsampled Attention)", "works_when")
def test_every_key_is_drawn_as_often_and_near_ones_more_often_where_biased() -> None:
    even, near = model(keep=0.25, causal=False), model(window=8, spread=6.0, causal=False)
    counts, seen = torch.zeros(N), torch.zeros(N)
    for _ in range(2000):
        drawn = even.draw(N)
        assert len(drawn) == len(set(drawn.tolist())) == 16
        counts[drawn] += 1
        order = near.draw(N)
        assert sorted(order.tolist()) == list(range(N))
        seen[order[30 - 4 : 30 + 4]] += 1
    assert ((counts / 2000 - 16 / N).abs() < 0.06).all()
    shares = (seen / 2000)[30:].unflatten(0, (-1, 1))[:28].view(-1, 7).mean(1)
    assert (shares.diff() < 0).all() and shares[0] > 0.3 and shares[-1] < 0.01


@pytest.mark.paper("SSA (Stochastically Subsampled Attention)", "works_when")
@torch.no_grad()
def test_sub_models_are_averaged_and_repeat_by_their_seeds() -> None:
    net = torch.nn.Sequential(model(causal=False, keep=0.5), model(causal=False, window=20)).double().eval()
    x, before = torch.randn(2, N, 24, dtype=torch.float64), torch.get_rng_state()
    several = ensemble(net, lambda: net(x), samples=6, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    singles = [ensemble(net, lambda: net(x), samples=1, seed=5 + number) for number in range(6)]
    assert_close(several, torch.stack(singles).mean(0))
    assert all(not torch.equal(one, singles[0]) for one in singles[1:])
    torch.manual_seed(5)
    assert_close(net.train()(x), singles[0]), "a sub-model is what training with that seed computes"
    net.eval()
    apart = [(one - net(x)).square().mean() for one in (several, *singles)]
    assert apart[0] < 0.8 * sum(apart[1:]) / 6, "together they are nearer to dense attention than alone"


def test_no_later_token_reaches_an_output_while_training() -> None:
    for options in ({"keep": 0.5}, {"window": 12}):
        ssa, x = model(**options).train(), torch.randn(1, N, 24, dtype=torch.float64)
        other = torch.cat([x[:, :30], torch.randn(1, N - 30, 24, dtype=torch.float64)], 1)
        outs = []
        for tokens in (x, other):
            torch.manual_seed(0)
            outs.append(ssa(tokens)[:, :30])
        assert_close(*outs)


@torch.no_grad()
def test_padded_sequences_are_drawn_for_one_by_one() -> None:
    ssa, x = model(keep=0.5).train(), torch.randn(2, N, 24, dtype=torch.float64)
    padding = torch.arange(N) < torch.tensor([[N], [17]])
    torch.manual_seed(0)
    out = ssa(x, padding=padding)
    torch.manual_seed(0)
    assert_close(out[:1], ssa(x[:1]))
    assert_close(out[1:, :17], ssa(x[1:, :17]))
    assert not out[1, 17:].any()


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.5}, {"window": 1}, {"spread": 2.0}])
def test_other_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"share of keys|number of keys|how far keys"):
        model(**options)
