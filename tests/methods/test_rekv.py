"""ReKV: a stream through a window, and questions over blocks that loops choose; as dense attention if all come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.llama_by_hand import logits, turned
from tests.support.small_models import small_model
from torch import Tensor

from foveate.cache.memory import Look
from foveate.cache.rekv import ReKVMemory
from foveate.catalogue import tiers

pytest.importorskip("transformers")
SINKS, WINDOW, BLOCK, BLOCKS, QUESTION = 2, 7, 5, 2, 4
CUTS = [31, 9, 3, 1, 1, 6, 4, 1]  # stream, stream, question, its answer, stream, question, its answer


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def softmax_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * k.shape[-1] ** -0.5).softmax(-1) @ v


def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """The definition, from heads that are not turned."""
    at = torch.arange(q.shape[1])
    out, turned_q, turned_k = torch.zeros_like(q), turned(q, at), turned(k, at)
    start, back = 0, []
    for count in CUTS:
        if count > QUESTION:
            back = []
        elif count > 1:
            asked = torch.cat([q[2 * g : 2 * g + 2, start : start + count].mean((0, 1)) for g in range(2)])
            likeness = {}
            for number in range(min(-(-start // BLOCK), (start + count - 1 - WINDOW) // BLOCK + 1)):
                keys = k[::2, number * BLOCK : min((number + 1) * BLOCK, start)].mean(1).flatten()
                likeness[number] = float(asked @ keys / asked.norm() / keys.norm())
            best = sorted(likeness, key=lambda number: -likeness[number])[:BLOCKS]
            back = [j for number in best for j in range(number * BLOCK, min((number + 1) * BLOCK, start))]
        for i in range(start, start + count):
            seen = [j for j in range(i + 1) if j < SINKS or i - j < WINDOW or j in back]
            for h in range(q.shape[0]):
                out[h, i] = softmax_over(turned_q[h, i : i + 1], turned_k[h, seen], v[h, seen])[0]
        start += count
    return out


@pytest.mark.paper("ReKV", "definition")
@pytest.mark.paper("ReKV", "works_when")
@pytest.mark.parametrize("on_disk", [False, True])
def test_streams_and_questions_are_those_of_loops(on_disk: bool, tmp_path: Path) -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (sum(CUTS),))
    want = logits(model, tokens, heads_out)
    options = {"sinks": SINKS, "window": WINDOW, "block": BLOCK, "blocks": BLOCKS, "question": QUESTION}
    change = tiers.row("rekv").make(**options, folder=tmp_path if on_disk else None).install(model)
    try:
        cache, got = None, []
        for part in tokens.split(CUTS):
            out = model(part[None], past_key_values=cache)
            cache = out.past_key_values
            got.append(out.logits[0])
            assert cache.layers[1].keys.shape[2] <= SINKS + WINDOW
    finally:
        change.undo()
    torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32
    stores = [layer.memory.store for layer in cache.layers]
    assert [store.count for store in stores] == [len(tokens)] * 2
    assert [store.written for store in stores] == [len(tokens) * 2 * 2 * 8 * 8] * 2
    assert [store.read for store in stores] == [2 * BLOCKS * BLOCK * 2 * 2 * 8 * 8] * 2  # two questions


@pytest.mark.paper("ReKV", "works_when")
@pytest.mark.parametrize("question", [1, 6])
def test_with_everything_brought_back_it_is_dense_attention(question: int) -> None:
    memory = ReKVMemory(2, 6, 4, 100, 8)
    q, k, v = (torch.randn(2, heads, 57 + question, 8, dtype=torch.float64) for heads in (4, 2, 2))
    place = torch.arange(57 + question) - torch.tensor([[0], [11]])
    place = place.masked_fill(place < 0, -1)
    for part in (slice(0, 30), slice(30, 57), slice(57, None)):
        out = memory.attend(q[:, :, part], k[:, :, part], v[:, :, part], Look(place[:, part], {"scale": 0.4}))
    assert memory.kept.shape[2] <= 2 + 6
    for entry, first in ((0, 0), (1, 11)):
        for h in range(4):
            scores = q[entry, h, 57:] @ k[entry, h // 2].mT * 0.4
            hidden = torch.ones(question, 57 + question).triu(58).bool()
            hidden[:, :first] = True
            want = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[entry, h // 2]
            torch.testing.assert_close(out[entry, h], want)


@pytest.mark.paper("ReKV", "works_when")
def test_measured_blocks_that_answer_tell_more_than_others() -> None:
    """Than as many at random; on the built-in model as many more recent tokens tell more still."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "kv_questions.json"
    losses = {name: sum(each) / len(each) for name, each in json.loads(path.read_text())["losses"].items()}
    assert losses["whole"] < losses["rekv"] < losses["blocks at random"] - 0.03


def test_a_block_fits_the_window() -> None:
    with pytest.raises(ValueError, match="fits the window"):
        tiers.row("rekv").make(window=10, block=20)
