"""Sparse sparse attention: a model learns with full and with block-sparse attention, whose outputs learn to agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foveate.catalogue.contracts import Stage
from foveate.catalogue.tiers import recipe
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.core import PatternCore
from foveate.mixers.dynamic_sparse.moba import MoBA
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.patterns import Layout, Pattern, topk_blocks
from foveate.recipes.conversion import Conversion, exchange, next_token_loss
from foveate.recipes.small_lm import SmallLM


class SparseSparseAttention(MoBA):
    """Attention to the best blocks of keys, or to all of them: with the same parameters, as is asked for.

    While :func:`aligned`, both are computed of the same queries, keys and values, and ``alignment`` is how far apart
    they are: the full output learns to be the sparse one, which lets what is not read count for less, and the sparse
    one to be the full one; each is a fixed target of the other.
    """

    alignment: Tensor | None = None
    aligns = False

    def __init__(self, dim: int, heads: int = 8, *, block: int = 64, k: int = 8, **options: Any) -> None:
        super().__init__(dim, heads, block=block, k=k, **options)  # type: ignore[call-arg]
        self.blocks = self.core

    def read(self, k: int | None) -> None:
        """Attend to ``k`` blocks from now on, the query's own among them; None is all keys."""
        self.core = PatternCore() if k is None else PatternCore(topk_blocks(self.block, k, causal=self.causal))

    @property
    def block(self) -> int:
        return self.blocks.pattern.block  # type: ignore[attr-defined]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, within: Pattern, layout: Layout | None) -> Tensor:
        out = super().attend(q, k, v, within, layout)
        if self.aligns:
            other = (PatternCore() if self.core is self.blocks else self.blocks)(q, k, v, within=within, layout=layout)
            self.alignment = mse_loss(out, other.detach()) + mse_loss(other, out.detach())
        return out

    def state_bytes(self, n: int) -> int:
        whole = self.core.pattern == PatternCore().pattern
        return AttentionMixer.state_bytes(self, n) if whole else super().state_bytes(n)


def layers_of(model: nn.Module) -> list[SparseSparseAttention]:
    """The layers that read all keys or some blocks of them; ValueError where there is none."""
    found = [module for module in model.modules() if isinstance(module, SparseSparseAttention)]
    if not found:
        raise ValueError(
            "the model has no SparseSparseAttention: prepare it by sparse_sparse_attention(...).prepare(model)"
        )
    return found


def read_blocks(model: nn.Module, k: int | None) -> None:
    """Let every layer attend to ``k`` blocks, at any budget, or to all keys (None).

    >>> student = sparse_sparse_attention(block=4, k=2).prepare(SmallLM(FlashAttention))
    >>> read_blocks(student, 3)
    >>> student.mixers[0].core.pattern
    topk_blocks(4, k=3)
    """
    for layer in layers_of(model):
        layer.read(k)


@contextmanager
def aligned(model: nn.Module, *, sparse: bool) -> Iterator[list[SparseSparseAttention]]:
    """Inside, layers pass on the sparse or the full output, and measure how far apart the two are."""
    layers = layers_of(model)
    before = [layer.core for layer in layers]
    for layer in layers:
        layer.core, layer.aligns = layer.blocks if sparse else PatternCore(), True
    try:
        yield layers
    finally:
        for layer, core in zip(layers, before, strict=True):
            layer.core, layer.aligns, layer.alignment = core, False, None


def ssa_loss(student: nn.Module, teacher: nn.Module, tokens: Tensor, *, alpha: float) -> Tensor:
    """Cross-entropy of each next token (B, N) in one mode, drawn for all layers, plus ``alpha`` times the alignment.

    In evaluation the mean over both modes, of which training draws one.
    """
    modes = [bool(torch.rand(()) < 0.5)] if student.training else [False, True]
    losses = []
    for sparse in modes:
        with aligned(student, sparse=sparse) as layers:
            loss = next_token_loss(student, teacher, tokens)
            apart = [layer.alignment for layer in layers if layer.alignment is not None]
            losses.append(loss + alpha * torch.stack(apart).mean())
    return torch.stack(losses).mean()


@recipe(
    "sparse_sparse_attention",
    papers=("SSA",),
    teacher=lambda: SmallLM(partial(FlashAttention, heads=4)),
    batch=lambda: torch.randint(16, (4, 24)),
    inherits=1.0,
    tiny={"block": 4, "k": 2},
)
def sparse_sparse_attention(*, block: int = 64, k: int = 8, alpha: float = 1.0) -> Conversion:
    """A causal language model learns to attend to all keys and to the best blocks of them alike, and does either.

    Every `AttentionMixer` of the model is exchanged for a `SparseSparseAttention` with its projections, which reads
    ``k`` blocks of ``block`` keys, chosen as MoBA does; `read_blocks` changes the budget, or reads all, at any
    time. The loss is E over modes of the model's own plus ``alpha`` times the mean over layers of
    |full - sg(sparse)|² + |sparse - sg(full)|². ``alpha`` and the square are a place to start from, not the paper's
    word. A model may as well be fresh: the paper trains from scratch. A batch is tokens (B, N).

    Shen, Lu, Gui, Li, He, Yin, Sun, SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in
    Feature Space, arXiv 2511.20102.

    >>> student = sparse_sparse_attention(block=4, k=2).prepare(SmallLM(FlashAttention))
    >>> student.mixers[0].core.pattern
    topk_blocks(4, k=2)
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is the weight of the alignment, at least 0; got {alpha}")

    def both_ways(mixer: AttentionMixer) -> SparseSparseAttention:
        sizes = {"kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "rotary": mixer.rotary}
        new = SparseSparseAttention(mixer.dim, mixer.heads, block=block, k=k, **sizes).to(mixer.weight)
        new.load_state_dict(mixer.state_dict())
        return new.train(mixer.training)

    def convert(model: nn.Module) -> None:
        exchange(model, AttentionMixer, both_ways)

    return Conversion(convert, (Stage("align", lambda name: True, partial(ssa_loss, alpha=alpha), lr=3e-4),))
