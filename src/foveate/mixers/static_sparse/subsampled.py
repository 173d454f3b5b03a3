"""Stochastically subsampled attention: a random part of the keys while training, all of them afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.attention import attend
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer, recent
from foveate.mixers.base import join_heads
from foveate.patterns import Layout, Pattern, full, window
from foveate.patterns.rules.earlier import Earlier


@register(
    "subsampled_attention",
    papers=("SSA (Stochastically Subsampled Attention)",),
    formula="o_i = Σ_{j∈S} softmax_j(q_i·k_j / √d) v_j, S drawn for each call while training; all keys in eval mode",
    supports={"causal", "noncausal", "padding", "packed", "decode", "gqa"},
    notes="ensemble(model, ...) averages several of the sub-models that the draws are.",
)
class SubsampledAttention(AttentionMixer):
    """Softmax attention that sees a random part of the keys while it trains, at as much less work.

    Unbiased: the ⌈``keep`` N⌉ keys that come first in ``torch.randperm(N)``. With a ``window``, locally biased: keys
    are shuffled to the order of j + ``spread`` ε_j, ε normal (``torch.randn(N)``), and the query at i sees those that
    come to lie in a window of so many around place i (those up to i where causal). Every call draws once, for all heads
    and batch entries, from torch's own generator on the CPU, so that ``torch.manual_seed`` repeats it; documents of a
    pack and padded sequences are drawn for one by one. Causal queries see no later key in either form; a query before
    the first key that was drawn gives zeros. In eval mode, and while decoding, it is plain attention.

    Hussain, Zaki, Subramanian, The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles,
    arXiv 2306.01705. Its authors' code was not at hand: how they shuffle locally, and whether heads share a draw, was
    chosen here.
    """

    tiny: ClassVar[dict[str, Any]] = {"keep": 0.5}
    full_budget: ClassVar[dict[str, Any] | None] = {}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        keep: float = 0.25,
        window: int | None = None,
        spread: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        if not 0 < keep <= 1:
            raise ValueError(f"keep is the share of keys that training sees, above 0 and at most 1; got {keep!r}")
        if window is not None and window < 2:
            raise ValueError(f"window is a number of keys, at least 2; got {window!r}")
        if spread is not None and (window is None or spread < 0):
            raise ValueError(f"spread is how far keys are shuffled in front of a window, at least 0; got {spread!r}")
        self.keep, self.local = keep, window
        self.spread = float(window or 0) if spread is None else spread
        self.sampling: bool | None = None  # None: while training

    @property
    def samples(self) -> bool:
        return self.training if self.sampling is None else self.sampling

    @property
    def one_by_one(self) -> bool:  # type: ignore[override]
        return self.samples

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        if not self.samples or not x.shape[1]:
            return super().mix(x, context, layout, padding)
        q, k, v = self.project(x, x)
        drawn = self.draw(x.shape[1]).to(x.device)
        near = full if self.local is None else self.near
        pattern = near & Earlier(drawn) if self.causal else near
        return self.to_out(join_heads(attend(q, k[:, :, drawn], v[:, :, drawn], pattern)))

    def draw(self, length: int) -> Tensor:
        """Which keys this call sees, in which order."""
        if self.local is None:
            return torch.randperm(length, device="cpu")[: math.ceil(self.keep * length)].sort().values
        return (torch.arange(length, device="cpu") + self.spread * torch.randn(length, device="cpu")).argsort()

    @property
    def near(self) -> Pattern:
        """The window of places."""
        assert self.local is not None
        return recent(self.local) if self.causal else window(self.local // 2, (self.local - 1) // 2)


@contextmanager
def subsampled(model: nn.Module, seed: int) -> Iterator[None]:
    """The sub-model that a seed draws, in eval mode too; the caller's random numbers go on as if nothing was drawn."""
    layers = [module for module in model.modules() if isinstance(module, SubsampledAttention)]
    if not layers:
        raise ValueError("the model has no subsampled attention")
    before = [layer.sampling for layer in layers]
    for layer in layers:
        layer.sampling = True
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        for layer, sampling in zip(layers, before, strict=True):
            layer.sampling = sampling


def ensemble(model: nn.Module, call: Callable[[], Tensor], *, samples: int = 8, seed: int = 0) -> Tensor:
    """The mean of what ``call()`` returns over sub-models of seeds ``seed``, ``seed + 1``, ...

    >>> mixer = SubsampledAttention(16, heads=2, keep=0.5).eval()
    >>> x = torch.randn(1, 9, 16)
    >>> ensemble(mixer, lambda: mixer(x), samples=4).shape
    torch.Size([1, 9, 16])

    Raises ValueError where the model has no subsampled attention, or ``samples`` is not positive.
    """
    if samples < 1:
        raise ValueError(f"an ensemble has at least one sub-model; got samples={samples!r}")
    outs = []
    for number in range(samples):
        with subsampled(model, seed + number):
            outs.append(call())
    return torch.stack(outs).mean(0)
