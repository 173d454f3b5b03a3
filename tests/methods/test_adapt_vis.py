"""AdaptVis: logits of marked keys multiplied inside a model, by a factor that its confidence chooses."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from foveate.methods.adapt_vis import ScaledKeys, adapt_vis
from foveate.testing.method import small_llama

IMAGE, LENGTH = (3, 9), 17


def eager(weight: float) -> Any:
    """Llama's plain attention, with the logits of the image's keys multiplied for queries after it."""

    def forward(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        logits = q @ k.mT * scaling
        first = k.shape[2] - q.shape[2]
        for i in range(q.shape[2]):
            if first + i >= IMAGE[1]:
                logits[:, :, i, IMAGE[0] : IMAGE[1]] *= weight
        hidden = torch.ones(logits.shape[2:], dtype=torch.bool).triu(first + 1)
        weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    return mock.patch("transformers.models.llama.modeling_llama.eager_attention_forward", forward)


def model() -> Any:
    made = small_llama().double().eval()
    made.set_attn_implementation("eager")
    return made


@pytest.mark.paper("AdaptVis", "definition")
@pytest.mark.paper("AdaptVis", "works_when")
@pytest.mark.parametrize("weight", [0.5, 1.5])
@torch.no_grad()
def test_logits_of_the_image_are_scaled_in_prompts_and_while_decoding(weight: float) -> None:
    llama, tokens = model(), torch.randint(64, (2, LENGTH))
    plain = llama(tokens).logits
    with eager(weight):
        expected = llama(tokens).logits
    assert (expected - plain).abs().max() > 1e-4
    change = adapt_vis(image=IMAGE, weight=weight).install(llama)
    torch.testing.assert_close(llama(tokens).logits, expected, rtol=1e-8, atol=1e-8)
    for prompt in (5, 12):  # in the midst of the image, and after it
        out = llama(tokens[:, :prompt], use_cache=True)
        logits = [out.logits]
        for t in range(prompt, LENGTH):
            out = llama(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-8, atol=1e-8)
    change.undo()
    torch.testing.assert_close(llama(tokens).logits, plain, rtol=0, atol=0)


@pytest.mark.paper("AdaptVis", "definition")
def test_gradients_are_those_of_scaled_logits() -> None:
    q, k, v = (torch.randn(2, h, 11, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    factors = torch.ones(11, 11, dtype=torch.float64)
    factors[6:, 2:6] = 0.7
    expected = (q @ keys.mT / 2 * factors).softmax(-1) @ values
    out = ScaledKeys(2, 6, 0.7)(q, k, v)
    torch.testing.assert_close(out, expected)
    towards = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(y, (q, k, v), towards) for y in (out, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.paper("AdaptVis", "works_when")
@torch.no_grad()
def test_each_call_is_scaled_by_what_the_models_confidence_chooses() -> None:
    """Prompts on both sides of the threshold, each written on with the factor that is due to it."""
    llama = model()
    prompts = [torch.randint(1, 64, (1, LENGTH)) for _ in range(6)]
    sure = [float(llama(prompt).logits[0, -1].softmax(-1).max()) for prompt in prompts]
    threshold = sum(sorted(sure)[2:4]) / 2
    method = adapt_vis(image=IMAGE, smooth=0.25, sharpen=3.0, threshold=threshold)
    chosen = []
    for prompt, confidence in zip(prompts, sure, strict=True):
        assert abs(method.confidence(llama, prompt) - confidence) < 1e-6
        weight = 0.25 if confidence < threshold else 3.0
        chosen.append(weight)
        assert method.factor(llama, prompt) == weight
        with eager(weight):
            expected = llama.generate(prompt, max_new_tokens=5, do_sample=False)
        written = method.generate(llama, prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(written, expected)
    assert chosen.count(0.25) == chosen.count(3.0) == 3


def test_it_begins_with_the_authors_factors() -> None:
    method = adapt_vis()
    assert (method.smooth, method.sharpen, method.threshold, method.weight) == (0.5, 1.5, 0.4, 1.0)


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="position of its first token"):
        adapt_vis(image=(5, 2))
    with pytest.raises(ValueError, match="one at a time"):
        adapt_vis(image=IMAGE).generate(model(), torch.ones(2, 12, dtype=torch.long))
    q = torch.randn(1, 1, 9, 4)
    with pytest.raises(ValueError, match="soft cap"):
        ScaledKeys(1, 3, 2.0)(q, q, q, softcap=5.0)
