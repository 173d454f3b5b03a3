"""ALISA inside models: recent tokens and the largest attention sums, chosen by loops over each query's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.llama_by_hand import exact, logits, turned
from tests.support.small_models import small_model
from torch import Tensor

from foveate.catalogue import tiers

pytest.importorskip("transformers")
PROMPT, LENGTH, BUDGET, HISTORY = 23, 61, 8, 3
KEPT = dict[tuple[int, int], list[list[int]]]  # of a layer's key head: what is kept after each token


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def by_hand(kept: KEPT, back: list[int]):
    """Heads out by the definition; what is kept, and how many tokens came back each time, go to the lists."""

    def chosen(rows: list[Tensor], end: int) -> list[int]:
        sums = torch.stack(rows[-HISTORY:]).sum(0)
        recent = list(range(end - BUDGET // 2, end))
        others = sorted(range(end - BUDGET // 2), key=lambda j: -sums[j])
        return sorted(others[: BUDGET - len(recent)] + recent)

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        out, at = exact(q, k, v, layer), torch.arange(LENGTH)
        scores = turned(q, at) @ turned(k, at).mT * q.shape[-1] ** -0.5
        for group in range(2):
            heads = [2 * group, 2 * group + 1]
            rows = []
            for i in range(PROMPT - HISTORY, PROMPT):
                weights = torch.zeros(2, LENGTH, dtype=torch.float64)
                weights[:, : i + 1] = scores[heads, i, : i + 1].softmax(-1)
                rows.append(weights.mean(0))
            now = chosen(rows, PROMPT)
            history = kept.setdefault((layer, group), [now])
            for i in range(PROMPT, LENGTH):
                seen = [*now, i]
                weights = torch.zeros(2, LENGTH, dtype=torch.float64)
                weights[:, seen] = scores[heads, i][:, seen].softmax(-1)
                out[heads, i] = (weights.unsqueeze(1) @ v[heads]).squeeze(1)
                rows.append(weights.mean(0))
                now = chosen(rows, i + 1)
                back.append(len(set(now) - set(seen)))
                history.append(now)
        return out

    return heads_out


def decoded(model, tokens: Tensor):
    """Logits of the whole text, the cache, and what each key head kept after each token."""
    out = model(tokens[None, :PROMPT])
    got, kept = [out.logits[0]], []
    for token in [*tokens[PROMPT:], None]:
        positions = [layer.memory.slots.position[0].tolist() for layer in out.past_key_values.layers]
        kept.append(positions)
        if token is not None:
            out = model(token.view(1, 1), past_key_values=out.past_key_values)
            got.append(out.logits[0])
    return torch.cat(got), out.past_key_values, kept


@pytest.mark.paper("ALISA", "definition")
@pytest.mark.paper("ALISA", "works_when")
@pytest.mark.parametrize("on_disk", [False, True])
def test_tokens_kept_and_logits_are_those_of_loops_over_weights(on_disk: bool, tmp_path: Path) -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (LENGTH,))
    kept: KEPT = {}
    back: list[int] = []
    want = logits(model, tokens, by_hand(kept, back))
    folder = tmp_path if on_disk else None
    change = tiers.row("alisa").make(budget=BUDGET, history=HISTORY, folder=folder).install(model)
    try:
        got, cache, positions = decoded(model, tokens)
    finally:
        change.undo()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32
    for (layer, group), history in kept.items():
        assert [at[layer][group] for at in positions] == history
    stores = [layer.memory.store for layer in cache.layers]
    assert all(store.count == LENGTH for store in stores)
    size = 2 * 8 * 8  # a key and a value of 8 channels in float64
    assert sum(store.written for store in stores) == 2 * 2 * LENGTH * size
    assert sum(back) > 0
    assert sum(store.read for store in stores) == sum(back) * size


def test_the_device_holds_the_budget_alone() -> None:
    model = small_model("llama")
    change = tiers.row("alisa").make(budget=BUDGET, history=HISTORY).install(model)
    try:
        cache, taken = model(torch.randint(1, 50, (2, 100))).past_key_values, []
        for _ in range(20):
            model(torch.randint(1, 50, (2, 1)), past_key_values=cache)
            taken.append(cache.layers[0].memory.nbytes)
        assert len(set(taken)) == 1
        assert cache.layers[0].keys.shape[2] == BUDGET
        assert cache.get_seq_length() == 120
        assert sum(rows.weights.shape[2] for rows in cache.layers[0].memory.rows) == HISTORY
    finally:
        change.undo()


def test_budgets_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens or more"):
        tiers.row("alisa").make(budget=1)


@pytest.mark.paper("ALISA", "works_when")
def test_measured_attention_sums_choose_better_than_chance() -> None:
    """Beside the same recent tokens; on the built-in model as many more recent tokens do better still."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "kv_budget.json"
    losses = {name: sum(each) / len(each) for name, each in json.loads(path.read_text())["losses"].items()}
    for budget in (128, 256):
        assert losses["whole"] < losses[f"alisa, {budget}"]
        assert losses[f"alisa, {budget}"] < losses[f"latest and random, {budget}"] - 0.02
