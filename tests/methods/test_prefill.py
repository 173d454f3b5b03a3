"""Methods for prompts inside models, on the built-in model's own text and on figures that a benchmark committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.small_models import SIX, small_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate import Pattern, causal, topk_keys
from foveate.adapt import use
from foveate.patterns.rules.hierarchical import halved_ranges
from foveate.patterns.rules.stripes import sampled_columns, stripes

pytest.importorskip("transformers")
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "prefill_methods.json"
METHODS = {
    "sample_attention": ("mass=0.5", "mass=1.0"),
    "anchor_attention": ("theta=0.5, block=3, step=2", "theta=1e9, block=3, step=2"),
    "proxy_attention": ("mass=0.3, block=4", "mass=1.0"),
    "dhsa": ("keys=7, chunk=4", "keys=4096"),
    "hip_attention": (
        "keys=6, q_block=4, k_block=2, first_keys=1, recent=2, dense_layers=0",
        "keys=4096, dense_layers=1",
    ),
}


@pytest.fixture(scope="module")
def heads() -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of four heads of the first and the last layer of the built-in model, for text it never saw."""
    from foveate.attention import attend
    from foveate.models import builtin

    model, tokenizer = builtin.load()
    ids = torch.tensor([tokenizer(builtin.heldout_text(4000)).input_ids[:700]])
    kept = []

    class Seeing:
        pattern = causal

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            kept.append((q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)))
            return attend(q, k, v, causal)

    use(model, Seeing())
    with torch.no_grad():
        model(ids, use_cache=False)
    return [(q[:, :4], k[:, :4]) for q, k in (kept[0], kept[-1])]


def weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[3] ** -0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf")).softmax(-1)


def recall(pattern: Pattern, heads: list[tuple[Tensor, Tensor]]) -> float:
    """The mean share of exact weights that fall on what a pattern sees."""
    kept = [(weights(q, k) * pattern.select(q, k).to_dense()).sum(-1).mean() for q, k in heads]
    return float(torch.stack(kept).mean())


@pytest.mark.paper("SampleAttention", "works_when")
@pytest.mark.parametrize("mass", [0.6, 0.95])
def test_the_recall_of_sampled_columns_is_what_was_asked_for(mass: float, heads: list[tuple[Tensor, Tensor]]) -> None:
    assert mass <= recall(sampled_columns(mass), heads) < 1


@pytest.mark.paper("AnchorAttention", "works_when")
def test_stripes_recall_more_the_greater_the_difference(heads: list[tuple[Tensor, Tensor]]) -> None:
    found = [recall(stripes(theta, block=64, step=2), heads) for theta in (0.0, 2.0, 6.0, 1e9)]
    assert found == sorted(found) and found[0] < found[2] < found[3] == pytest.approx(1)
    assert found[2] > 0.9


@pytest.mark.paper("HiP", "works_when")
def test_the_search_finds_most_of_the_true_best_keys(heads: list[tuple[Tensor, Tensor]]) -> None:
    for q, k in heads:
        true = topk_keys(32).select(q, k).to_dense()[:, :, 350:]
        found = halved_ranges(96, q_block=8, k_block=2).select(q, k).to_dense()[:, :, 350:]
        chance = found.sum() / (350 + torch.arange(1, 351)).sum() / 4
        assert (found & true).sum() / true.sum() > max(0.5, 2 * chance)


@pytest.mark.paper("HiP", "works_when")
def test_on_the_model_the_search_grows_like_n_log_n(heads: list[tuple[Tensor, Tensor]]) -> None:
    flops = []
    for length in (170, 680):
        with FlopCounterMode(display=False) as counter:
            for q, k in heads:
                halved_ranges(32, q_block=8, k_block=2).select(q[:, :, :length], k[:, :, :length])
        flops.append(counter.get_total_flops())
    assert 3.5 < flops[1] / flops[0] < 7  # n log n gives 5, n squared 16


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("method", METHODS)
def test_in_six_architectures_with_all_of_the_budget_nothing_changes(method: str, name: str) -> None:
    model, tokens = small_model(name), torch.randint(1, 50, (2, 37))
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    little, all_of_it = METHODS[method]
    with torch.no_grad():
        plain, written = model(tokens).logits, model.generate(tokens, **options)
        change = use(model, f"{method}({all_of_it})")
        same, also_written = model(tokens).logits, model.generate(tokens, **options)
        change.undo()
        change = use(model, f"{method}({little})")
        other = model(tokens).logits
        change.undo()
    torch.testing.assert_close(same, plain)
    assert torch.equal(written, also_written)
    assert (other - plain).abs().max() > 1e-3


@pytest.mark.paper("SampleAttention", "works_when")
@pytest.mark.paper("AnchorAttention", "works_when")
@pytest.mark.paper("ProxyAttn", "works_when")
@pytest.mark.paper("HiP", "works_when")
@pytest.mark.paper("DHSA", "works_when")
def test_recall_sparsity_and_time_of_long_prompts_were_measured() -> None:
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert found["length"] >= 16384

    def mean(method: str, field: str) -> float:
        own = [line[field] for line in found["lines"] if line["method"] == method]
        return sum(own) / len(own)

    assert mean("sample_attention", "recall") >= 0.95
    assert mean("anchor_attention", "recall") >= 0.95
    assert mean("proxy_attention", "recall") >= 0.9
    for method in ("sample_attention", "anchor_attention", "proxy_attention", "hip_attention"):
        assert mean(method, "share_of_pairs") < 0.5
        assert mean(method, "seconds") < mean(method, "dense")
    assert mean("hip_attention", "seconds") < 0.25 * mean("hip_attention", "dense")
    assert mean("dhsa", "share_of_pairs") < 0.3 and mean("dhsa", "seconds") < 0.6 * mean("dhsa", "dense")
