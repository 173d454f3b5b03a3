"""Mechanisms of layers and heads, as data: what each head sees, what is saved, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.llama_by_hand import exact, logits, turned
from tests.support.small_models import small_model
from torch import Tensor

from foveate import sinks, window
from foveate.adapt import Assignment, use
from foveate.adapt.assignment import FILE, Part
from foveate.methods.minference import as_parts, minference

pytest.importorskip("transformers")
MIXED = {0: {(0, 3): "window(4)", 1: "streaming_llm(sinks=1, window=3)"}, -1: window(6) | sinks(2)}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def seen_of_mixed(count: int) -> Tensor:
    """(layers, heads, N, N) by hand; head 2 of layer 0 is left as it is."""
    at = torch.arange(count)
    apart = at[:, None] - at
    causal = apart >= 0
    seen = causal.expand(2, 4, count, count).clone()
    seen[0, 0] = seen[0, 3] = causal & (apart <= 4)
    seen[0, 1] = causal & ((apart < 3) | (at < 1))
    seen[1] = causal & ((apart <= 6) | (at < 2))
    return seen


def test_each_head_of_each_layer_attends_as_it_is_told() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (37,))
    seen = seen_of_mixed(len(tokens))

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        at = torch.arange(q.shape[1])
        scores = turned(q, at) @ turned(k, at).mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen[layer], float("-inf")).softmax(-1) @ v

    plain = model(tokens[None]).logits
    change = use(model, MIXED)
    found = model(tokens[None]).logits[0]
    begun = model(tokens[None, :20])
    stepped = [begun.logits[0]]
    for token in tokens[20:]:
        stepped.append(model(token.view(1, 1), past_key_values=begun.past_key_values).logits[0])
    change.undo()
    want = logits(model, tokens, heads_out)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32
    torch.testing.assert_close(torch.cat(stepped), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(tokens[None]).logits, plain)


def test_prompts_alone_are_cut_where_that_is_said() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (31,))
    cut = {"use": "window(2)", "layers": [1], "heads": [2, 3], "prompts": True}
    seen = torch.ones(31, 31).tril().bool().expand(4, 31, 31).clone()
    seen[2:, :24] &= ~torch.ones(24, 31).tril(-3).bool()  # prompts of 24 tokens

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if layer == 0:
            return exact(q, k, v, layer)
        at = torch.arange(q.shape[1])
        scores = turned(q, at) @ turned(k, at).mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    change = Assignment.of([cut]).install(model)
    begun = model(tokens[None, :24])
    found = [begun.logits[0]]
    for token in tokens[24:]:
        found.append(model(token.view(1, 1), past_key_values=begun.past_key_values).logits[0])
    change.undo()
    torch.testing.assert_close(torch.cat(found), logits(model, tokens, heads_out), atol=1e-5, rtol=1e-5)


def test_layers_keep_memories_of_different_methods_and_give_them_up_one_by_one() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (1, 60))
    plain = model(tokens).logits

    def lengths() -> list[int]:
        cache = model(tokens).past_key_values
        assert cache.get_seq_length() == 60
        return [layer.keys.shape[2] for layer in cache.layers]

    change = use(model, {0: "attention_sinks(sinks=2, window=9)", 1: "cake(budget=20, window=4)"})
    assert lengths() == [10, 20]
    model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    change.undo()
    assert lengths() == [60, 60] and torch.equal(model(tokens).logits, plain)
    first = use(model, "attention_sinks(sinks=2, window=9)", layers=[0])
    second = use(model, "attention_sinks(sinks=1, window=5)", layers=[1])
    assert lengths() == [10, 5]
    with pytest.raises(ValueError, match="another method keeps the memory of some of these layers"):
        use(model, "cake(budget=20, window=4)")
    first.undo()
    assert lengths() == [60, 5]
    second.undo()
    assert lengths() == [60, 60] and torch.equal(model(tokens).logits, plain)
    assert "_prepare_cache_for_generation" not in vars(model) and not model._forward_pre_hooks


def test_what_is_saved_beside_a_model_comes_back(tmp_path: Path) -> None:
    made = Assignment.of(MIXED | {"all": "attention_sinks(sinks=2)"})
    assert made.save(tmp_path) == tmp_path / FILE
    found = Assignment.load(tmp_path)
    assert found == made and Assignment.load(made.save(tmp_path / "other.json")) == made
    assert found.parts[1] == Part("streaming_llm(sinks=1, window=3)", (0,), (1,)) and found.parts[-1].layers is None
    model, tokens = small_model("qwen3"), torch.randint(1, 50, (1, 40))
    outs = []
    for one in (MIXED, Assignment.load(Assignment.of(MIXED).save(tmp_path))):
        change = use(model, one)
        outs.append(model(tokens).logits)
        change.undo()
    assert torch.equal(*outs) and not torch.equal(outs[0], model(tokens).logits)


def test_minferences_search_has_the_same_form(tmp_path: Path) -> None:
    found = [
        {0: ("stream_llm", 2, 5), 2: ("block_sparse", 2, 1)},
        {1: ("vertical_and_slash", 3, 4), 3: ("stream_llm", 2, 5)},
    ]
    theirs = [{str(head): [*one, 0.5] for head, one in layer.items()} for layer in found]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    loaded = Assignment.load(tmp_path / "theirs.json")
    sizes = {"block": 4, "last": 5, "first": 1, "near": 2}
    ours = Assignment.of(as_parts(found, **sizes))
    assert [(part.layers, part.heads) for part in loaded.parts] == [(p.layers, p.heads) for p in ours.parts]
    model, tokens = small_model("llama"), torch.randint(1, 50, (1, 45))
    outs = []
    for way in (ours, Assignment.load(ours.save(tmp_path)), minference(found, ("stream_llm", 64, 64), **sizes)):
        change = way.install(model)
        outs.append(model(tokens).logits)
        change.undo()
    torch.testing.assert_close(outs[0], outs[2], atol=1e-12, rtol=1e-12)
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], model(tokens).logits)


def test_what_cannot_be_assigned_is_refused_in_words(tmp_path: Path) -> None:
    model = small_model("llama")
    for given, message in (
        ({}, "at least one part"),
        ({0: "nothing_known"}, "nothing_known"),
        ({0: 3}, "a name, with options or without"),
        ({"some": "window(3)"}, "layers are numbers, or 'all'; got 'some'"),
        ({(): "window(3)"}, r"layers are numbers, or 'all'; got \(\)"),
        ({0: {True: "window(3)"}}, "heads are numbers"),
        ({0: {1: "attention_sinks"}}, "a method for whole layers"),
        ([{"use": "attention_sinks", "prompts": True}], "neither heads nor prompts"),
        ([{"use": "window(3)", "layer": 0}], "may have 'layers', 'heads' and 'prompts'"),
        ([{"use": "window(3)", "prompts": 1}], "prompts is true or false"),
        ({0: "gla"}, "must be trained"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Assignment.of(given)
    plain = model(torch.arange(9).view(1, 9)).logits
    with pytest.raises(ValueError, match="layers are numbered"):
        use(model, {0: "window(3)", 5: "window(3)"})
    assert torch.equal(model(torch.arange(9).view(1, 9)).logits, plain)  # nothing of it is left
    with pytest.raises(ValueError, match="says itself which layers"):
        use(model, {0: "window(3)"}, layers=[1])
    for text, message in (
        ("[", "is not JSON"),
        ("{}", "is not an assignment"),
        ("[3]", "neither an assignment nor a configuration of MInference"),
        ('{"format": "foveate assignment 1", "parts": [{"use": "windw(3)"}]}', "windw"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Assignment.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="cannot read an assignment"):
        Assignment.load(tmp_path / "nowhere.json")


def test_what_was_saved_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Assignment.of({0: "window(8)"})
    before.save(tmp_path)
    write = Path.write_text

    def half(path: Path, text: str, **options: Any) -> int:
        write(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        Assignment.of({0: "window(9)"}).save(tmp_path)
    assert Assignment.load(tmp_path) == before and len(list(tmp_path.iterdir())) == 1
