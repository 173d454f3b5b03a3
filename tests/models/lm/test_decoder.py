"""SWAN-GPT and GEB: decoders written out with dense masks, switches layer by layer, and caches of two kinds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tests.support.decoders import gated, louder, rms, turned
from tests.support.formulas import follows
from torch import Tensor, nn

from foveate.models.lm import geb, swan_gpt
from foveate.models.lm.decoder import LayerKind

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SWAN = {"dim": 12, "depth": 5, "heads": 3, "kv_heads": 1, "hidden": 20, "window": 4, "trained": 6}
GEB = {"dim": 12, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "hidden": 20}


def attention(mixer: nn.Module, x: Tensor, kind: LayerKind, heads: int, kv_heads: int) -> Tensor:
    """Keys and values repeated for each query head, a dense mask, and the whole table of logits."""
    batch, length, _ = x.shape
    q = (x @ mixer.to_q.weight.T).view(batch, length, heads, -1).transpose(1, 2)
    k, v = ((x @ w.weight.T).view(batch, length, kv_heads, -1).transpose(1, 2) for w in (mixer.to_k, mixer.to_v))
    if kind.rotary is not None:
        q, k = turned(q, kind.rotary), turned(k, kind.rotary)
    k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if kind.trained is not None:
        scales = [max(1.0, math.log(n) / math.log(kind.trained)) for n in range(1, length + 1)]
        logits = logits * torch.tensor(scales, dtype=x.dtype).unsqueeze(1)
    apart = torch.arange(length).unsqueeze(1) - torch.arange(length)
    hidden = (apart < 0) | (apart >= (length if kind.window is None else kind.window))
    out = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2) @ mixer.to_out.weight.T


def formula(model: nn.Module, tokens: Tensor, kinds: list[LayerKind], heads: int, kv_heads: int) -> Tensor:
    x = model.embed.weight[tokens]
    for layer, kind in zip(model.layers, kinds, strict=True):
        x = x + attention(layer.mixer, rms(x, layer.norm.weight), kind, heads, kv_heads)
        x = x + gated(layer.channels, rms(x, layer.channels_norm.weight))
    return rms(x, model.norm.weight) @ model.head.weight.T


WIDE, NEAR = LayerKind(None, None, 6), LayerKind(4, 10_000.0)


@pytest.mark.paper("SWAN-GPT", "definition")
def test_swan_is_windows_with_positions_and_all_keys_without_by_turns() -> None:
    model = louder(swan_gpt(11, **SWAN).double())
    tokens = torch.randint(11, (2, 17))
    kinds = [WIDE, NEAR, NEAR, NEAR, WIDE]
    follows(model, lambda: model(tokens), lambda: formula(model, tokens, kinds, 3, 1))


@pytest.mark.paper("SWAN-GPT", "works_when")
@pytest.mark.parametrize(
    "kinds",
    [
        [LayerKind(None, 500.0), LayerKind(3, None), LayerKind(None, None, 4)],
        [LayerKind(7, 100.0, 3), LayerKind(None, None), LayerKind(1, 100.0)],
    ],
)
def test_each_layer_has_its_own_switches(kinds: list[LayerKind]) -> None:
    """Window, positions and scale in every combination that differs from the others by one switch."""
    model = louder(swan_gpt(11, kinds=kinds, **SWAN).double())
    tokens = torch.randint(11, (2, 13))
    follows(model, lambda: model(tokens), lambda: formula(model, tokens, kinds, 3, 1))


@pytest.mark.paper("SWAN-GPT", "works_when")
@pytest.mark.parametrize("prompt", [3, 25])
def test_decoding_past_the_trained_length_equals_prefill_with_caches_of_two_kinds(prompt: int) -> None:
    """Trained on 6 tokens: logits of up to 240, from a cache that grows in two layers and rolls in three."""
    model = louder(swan_gpt(11, **SWAN).double())
    tokens = torch.randint(11, (2, 240))
    with torch.no_grad():
        expected = formula(model, tokens, [WIDE, NEAR, NEAR, NEAR, WIDE], 3, 1)
        out, state = model.prefill(tokens[:, :prompt], model.init_state(2))
        outs = [out]
        for t in range(prompt, 240):
            out, state = model.decode(tokens[:, t : t + 1], state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-8, atol=1e-8)
    kept = [cache.k.shape[2] for cache in state]
    assert [kept[0], kept[4]] == [240, 240]
    assert all(length < 60 for length in kept[1:4])


@pytest.mark.paper("GEB-1.3B", "definition")
def test_geb_is_rotary_attention_with_repeated_keys_and_gated_layers() -> None:
    model = louder(geb(11, **GEB).double())
    tokens = torch.randint(11, (2, 9))
    follows(model, lambda: model(tokens), lambda: formula(model, tokens, [LayerKind()] * 2, 4, 2))


@pytest.mark.paper("GEB-1.3B", "works_when")
def test_geb_decodes_in_single_precision_what_the_repeated_reference_gives() -> None:
    model = louder(geb(11, **GEB))
    tokens = torch.randint(11, (3, 40))
    with torch.no_grad():
        out, state = model.prefill(tokens[:, :21], model.init_state(3))
        outs = [out]
        for t in range(21, 40):
            out, state = model.decode(tokens[:, t : t + 1], state)
            outs.append(out)
        expected = formula(model.double(), tokens, [LayerKind()] * 2, 4, 2)
    torch.testing.assert_close(torch.cat(outs, 1).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.paper("GEB-1.3B", "works_when")
def test_gebs_tokens_a_second_were_measured_at_its_own_size() -> None:
    with torch.device("meta"):
        whole = geb()
    count = sum(parameter.numel() for parameter in whole.parameters())
    assert 1.25e9 < count < 1.35e9  # "1.3B"
    (case,) = json.loads((RESULTS / "geb.json").read_text(encoding="utf-8"))["cases"]
    assert case["parameters"] == count
    assert case["dtype"] == "float32"
    assert all(rate > 0 for rate in case["tokens_per_second"].values())
    assert case["tokens_per_second"]["prompt"] > case["tokens_per_second"]["decoding"]


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="every is"):
        swan_gpt(11, every=0)
    with pytest.raises(ValueError, match="at least 2"):
        swan_gpt(11, **{**SWAN, "trained": 1})
