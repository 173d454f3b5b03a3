"""S2-Attention: each head has its own shard of the context, and all of it the heads together."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from foveate.catalogue.budget import Budget
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer, RotaryOptions
from foveate.mixers.core import PatternCore
from foveate.patterns import Pattern, causal, every_block, local_blocks, per_head


def s2_core(*, block: int = 64, local: int = 16, stride: int = 8, heads: int | None = None) -> PatternCore:
    """The last ``local`` blocks, and every ``stride``-th block from one on that differs from head to head.

    Head h sees the blocks c with (c + h) mod ``stride`` = 0, as in the authors' library; ``stride`` heads by default.

    >>> s2_core(block=4, local=2, stride=3, heads=3).pattern
    (local_blocks(4, 2) | per_head([every_block(4, 3, 0), every_block(4, 3, 2), every_block(4, 3, 1)])) & causal

    Raises ValueError where the heads together would leave out blocks: fewer heads than ``stride``.
    """
    heads = stride if heads is None else heads
    if heads < stride:
        raise ValueError(
            f"each of {stride} neighbouring blocks needs a head that keeps it: at least stride={stride} heads of keys;"
            f" got {heads}"
        )
    shards = [every_block(block, stride, -head % stride) for head in range(heads)]
    strides: Pattern = shards[0] if stride == 1 else per_head(shards)
    return PatternCore((local_blocks(block, local) | strides) & causal)


@register(
    "s2_attention",
    papers=("S2-Attention",),
    formula="o_i^h = Σ_{j≤i} softmax_j(q_i·k_j / √d) v_j over ⌊i/b⌋ - ⌊j/b⌋ < l or (⌊j/b⌋ + h) mod s = 0",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    core=s2_core,
    notes="A block that has left a head's local ones and is not of its shard is never read again: a decoder drops it.",
)
class S2Attention(AttentionMixer):
    """Attention to local blocks and to every s-th block, another one in each head: together all of the context.

    Query heads that share keys share a shard, so that their cache holds no more than one: the head h above is the
    head of keys. Sizes are those that the authors name for Phi-3-small: blocks of 64, 16 local ones, one in 8 beyond.
    The authors' library lets fewer heads than the stride skip some blocks altogether; here that is refused.

    >>> S2Attention(64, heads=8).core.pattern.heads
    8
    """

    tiny: ClassVar[dict[str, Any]] = {"block": 3, "local": 2, "stride": 2}
    full_budget: ClassVar[dict[str, Any] | None] = {"stride": 1}
    spends: ClassVar[Budget | str | None] = Budget("stride", levels=(32, 16, 8, 4, 2))
    exempt: ClassVar[dict[str, str]] = {"shared keys": "heads that share keys share a shard of the context as well"}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        block: int = 64,
        local: int = 16,
        stride: int = 8,
        **options: Unpack[RotaryOptions],
    ) -> None:
        core = s2_core(block=block, local=local, stride=stride, heads=options.get("kv_heads") or heads)
        super().__init__(dim, heads, core=core, **options)
