"""AdaptVis: logits of an image's tokens are scaled up where the model is confident, and down where it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from foveate.adapt.swap import Swap, use
from foveate.attention import attend
from foveate.catalogue.tiers import method
from foveate.mixers.core import CoreOptions, one_by_one
from foveate.patterns import Pattern, full

if TYPE_CHECKING:
    from torch import nn

    from foveate.adapt.hf.layers import Layers


@dataclass(frozen=True)
class ScaledKeys:
    """Attention whose logits of the keys from ``first`` to ``end`` are multiplied by ``weight``, for later queries.

    >>> q = k = v = torch.randn(1, 2, 9, 4)
    >>> ScaledKeys(2, 5, 1.5)(q, k, v).shape
    torch.Size([1, 2, 9, 4])
    """

    first: int
    end: int
    weight: float
    pattern: Pattern = full

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: Unpack[CoreOptions]
    ) -> Tensor:
        if self.weight != 1 and options.get("softcap") is not None:
            raise ValueError("logits under a soft cap cannot be scaled through their keys")
        if self.weight == 1:
            return attend(q, k, v, within, **options)
        alone = one_by_one(self, q, k, v, within=within, **options)
        if alone is not None:
            return alone
        marked = torch.ones(k.shape[2], dtype=k.dtype, device=k.device)
        marked[self.first : self.end] = self.weight
        before = self.end - (k.shape[2] - q.shape[2])  # queries that stand before the marked keys' end
        whole = None if before <= 0 else attend(q, k, v, within, **options)
        if whole is not None and before >= q.shape[2]:
            return whole
        scaled = attend(q, k * marked.unsqueeze(1), v, within, **options)
        if whole is None:
            return scaled
        later = torch.arange(q.shape[2], device=q.device) >= before
        return torch.where(later.unsqueeze(1), scaled, whole)


@dataclass(frozen=True)
class AdaptVis:
    """What :func:`adapt_vis` returns: ``install`` scales by one factor, :meth:`generate` finds out by which."""

    image: tuple[int, int]
    weight: float
    smooth: float
    sharpen: float
    threshold: float
    layers: Layers | None = None

    def install(self, model: nn.Module) -> Swap:
        """Let later tokens see the image's with their logits times ``weight``."""
        return use(model, ScaledKeys(*self.image, self.weight), layers=self.layers)

    @torch.no_grad()
    def confidence(self, model: nn.Module, tokens: Tensor) -> float:
        """The greatest probability of the first token that the model would write after tokens (1, N)."""
        logits = model(tokens).logits[0, -1]
        return float(logits.float().softmax(-1).max())

    def factor(self, model: nn.Module, tokens: Tensor) -> float:
        """``smooth`` where the model is less sure than ``threshold`` of what it would write first, else ``sharpen``."""
        return self.smooth if self.confidence(model, tokens) < self.threshold else self.sharpen

    def generate(self, model: Any, tokens: Tensor, **options: Any) -> Tensor:
        """What ``model.generate`` writes after tokens (1, N), with the image's logits scaled by :meth:`factor`."""
        if tokens.dim() != 2 or tokens.shape[0] != 1:
            raise ValueError(
                f"each prompt has a factor of its own: pass one at a time, (1, N); got {tuple(tokens.shape)}"
            )
        core = ScaledKeys(*self.image, self.factor(model, tokens))
        change = use(model, core, layers=self.layers)
        try:
            return model.generate(tokens, **options)
        finally:
            change.undo()


@method(
    "adapt_vis",
    papers=("AdaptVis",),
    tiny={"image": (3, 11), "weight": 2.5},
    full_budget={"weight": 1.0},
)
def adapt_vis(
    image: tuple[int, int] = (1, 577),
    weight: float = 1.0,
    smooth: float = 0.5,
    sharpen: float = 1.5,
    threshold: float = 0.4,
    layers: Layers | None = None,
) -> AdaptVis:
    """AdaptVis: attention to an image's tokens is sharpened where the model is confident and smoothed where it is not.

    ``image`` are the position of the image's first token and the one after its last. Installed, it multiplies the
    logits of these keys by ``weight``, for every query after them, in prompts and while decoding (its ScalingVis).
    ``generate`` first asks the plain model how sure it is of its first token, and takes ``smooth`` below ``threshold``,
    else ``sharpen``; these three are those of the authors' published script.

    Chen, Zhu, Zhou, Zhang, Gao et al., Why Is Spatial Reasoning Hard for VLMs?, arXiv 2503.01773. Their code scales the
    last query of the prompt alone; here all text after the image is, so that decoding and prompts agree.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model, prompt = LlamaForCausalLM(small).eval(), torch.arange(12).view(1, 12)
    >>> adapt_vis(image=(1, 9)).generate(model, prompt, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 15])

    Raises ValueError for an image that ends before it begins.
    """
    if not 0 <= image[0] <= image[1]:
        raise ValueError(f"image is the position of its first token and the one after its last; got {image}")
    return AdaptVis(image, weight, smooth, sharpen, threshold, layers)
