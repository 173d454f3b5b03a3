"""A language model's softmax attention becomes linear attention with a causal convolution of the values."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from foveate.catalogue.contracts import Stage
from foveate.catalogue.tiers import recipe
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.mixers.linear.linearized import LinearizedLLM
from foveate.recipes.conversion import Conversion, exchange, next_token_loss
from foveate.recipes.small_lm import SmallLM


@recipe(
    "linearise",
    papers=("Linearized-LLM",),
    teacher=lambda: SmallLM(partial(FlashAttention, heads=4)),
    batch=lambda: torch.randint(16, (4, 24)),
    inherits=0.9,
)
def linearise(**options: Any) -> Conversion:
    """A language model's softmax attention becomes linear with a causal convolution, and the whole is fine-tuned.

    Every `AttentionMixer` of the model is exchanged for a `LinearizedLLM` with its projections; its convolution is
    new, and ``options`` are its options. A batch is tokens (B, N).

    You, Fu, Wang, Yazdanbakhsh, Lin, When Linear Attention Meets Autoregressive Decoding, arXiv 2406.07368.

    >>> student = linearise(width=4).prepare(SmallLM(FlashAttention))
    >>> type(student.mixers[0]).__name__
    'LinearizedLLM'
    """

    def linear(mixer: AttentionMixer) -> LinearizedLLM:
        sizes = {"kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim} | options
        new = LinearizedLLM(mixer.dim, mixer.heads, **sizes).to(mixer.weight)
        new.load_state_dict(mixer.state_dict(), strict=False)
        return new.train(mixer.training)

    def convert(model: nn.Module) -> None:
        exchange(model, AttentionMixer, linear)

    return Conversion(convert, (Stage("fine-tune", lambda name: True, next_token_loss, lr=1e-4),))
