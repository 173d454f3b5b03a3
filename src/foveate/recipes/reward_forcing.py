"""Reward Forcing's student: a model that streams with sinks which average what has left its window."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foveate.catalogue.contracts import Stage
from foveate.catalogue.tiers import recipe
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.mixers.normalizer_sink.ema_sink import EMASinkAttention
from foveate.recipes.conversion import Conversion, exchange
from foveate.recipes.small_lm import SmallLM


@recipe(
    "reward_forcing",
    papers=("Reward Forcing (EMA-Sink)",),
    teacher=lambda: SmallLM(partial(FlashAttention, heads=4, causal=False)),
    batch=lambda: torch.randint(16, (4, 24)),
    inherits=0.99,
    tiny={"window": 2, "block": 4, "alpha": 0.9},
)
def reward_forcing(**options: Any) -> Conversion:
    """A model that sees whole videos becomes one that streams, at constant memory, and learns to give the same.

    Every `AttentionMixer` of the model is exchanged for an `EMASinkAttention` with its weights, whose options
    ``options`` are. The stage brings the student's outputs on a batch near its teacher's, in squares; the paper's
    rewarded distribution matching, which needs a diffusion model and a reward model, is not here.

    Lu et al., Reward Forcing, arXiv 2512.04678.

    >>> student = reward_forcing(window=2, block=4).prepare(SmallLM(partial(FlashAttention, causal=False)))
    >>> student(torch.randint(16, (1, 24))).shape
    torch.Size([1, 24, 16])
    """

    def streaming(mixer: AttentionMixer) -> EMASinkAttention:
        sizes = {"kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "rotary": mixer.rotary} | options
        new = EMASinkAttention(mixer.dim, mixer.heads, **sizes).to(mixer.weight)
        new.load_state_dict(mixer.state_dict())
        return new.train(mixer.training)

    def convert(model: nn.Module) -> None:
        exchange(model, AttentionMixer, streaming)

    return Conversion(convert, (Stage("distil", lambda name: True, near_teacher, lr=1e-3),))


def near_teacher(student: nn.Module, teacher: nn.Module, batch: Tensor) -> Tensor:
    """The mean square by which outputs differ."""
    with torch.no_grad():
        wanted = teacher(batch)
    return mse_loss(student(batch), wanted)
