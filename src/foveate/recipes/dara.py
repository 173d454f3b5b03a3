"""DARA: a frozen model learns a few factors by which its heads look at images."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from foveate.catalogue.contracts import Stage
from foveate.catalogue.tiers import recipe
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.mixers.normalizer_sink.group_scale import GroupScaledAttention, Spans
from foveate.recipes.conversion import Conversion, next_token_loss
from foveate.recipes.small_lm import SmallLM


@recipe(
    "dara",
    papers=("DARA",),
    teacher=lambda: SmallLM(partial(FlashAttention, heads=4)),
    batch=lambda: torch.randint(16, (4, 24)),
    inherits=1.0,
    tiny={"images": ((1, 7), (9, 14))},
)
def dara(*, images: Spans, layers: int = 1) -> Conversion:
    """A model's first layers get a factor for the logits of each image's tokens in each head; nothing else learns.

    ``images`` are the spans of positions of the prompt's images, ``layers`` how many `AttentionMixer`s from the first
    on are given factors. Factors are 1 at first, so that the student computes what the model does. A batch is tokens
    (B, N), and the loss that of the next token.

    Chen et al., True Multimodal In-Context Learning Needs Attention to the Visual Context, arXiv 2507.15807. Its data
    set is not here.

    >>> student = dara(images=((1, 9),)).prepare(SmallLM(FlashAttention))
    >>> student.mixers[0].factors.shape
    torch.Size([8, 1])
    """
    if layers < 1:
        raise ValueError(f"layers is how many from the first on are given factors, at least 1; got {layers}")

    def convert(model: nn.Module) -> None:
        names = [name for name, module in model.named_modules() if name and isinstance(module, AttentionMixer)]
        if not names:
            raise ValueError("the model has no AttentionMixer to give factors to")
        for name in names[:layers]:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, scaled(owner.get_submodule(child), images))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("factors"))

    stage = Stage("rebalance", lambda name: name.endswith("factors"), next_token_loss, lr=1e-2)
    return Conversion(convert, (stage,))


def scaled(mixer: nn.Module, images: Spans) -> GroupScaledAttention:
    """The same attention with factors."""
    if type(mixer) is not FlashAttention:
        raise ValueError(f"factors go into plain attention, FlashAttention; got {type(mixer).__name__}")
    options = {"kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "rotary": mixer.rotary, "causal": mixer.causal}
    new = GroupScaledAttention(mixer.dim, mixer.heads, groups=images, core=mixer.core, **options).to(mixer.weight)
    new.load_state_dict(mixer.state_dict(), strict=False)
    return new.train(mixer.training)
