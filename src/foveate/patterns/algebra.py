"""The algebra of patterns: which pairs (query, key) are visible.

A pattern is a tree of leaves joined by ``&``, ``|``, ``~`` and ``per_head``. Three questions are asked of it:

- ``visible``: is this pair allowed? Elementwise over index tensors; the definition.
- ``bounds``: of a box of pairs, may some be visible, are surely all? Interval reasoning; never touches pairs.
- ``signature``: tiles with equal signatures hold equal masks, so each distinct mask is evaluated once.

A pattern that needs more than positions (a grid, the queries and keys themselves) is first ``resolve``d.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from foveate.layouts.kinds import Layout, Sequence
from foveate.patterns.identity import fields_of, same

if TYPE_CHECKING:
    from foveate.layouts.place import Place
    from foveate.patterns.drawing.draw import Drawing
    from foveate.patterns.select.selection import Selection

Index = Tensor | int
LINE = Sequence()


class Bounds(NamedTuple):
    """Of each box of pairs: may ``some`` be visible, are surely ``every`` one."""

    some: Tensor
    every: Tensor


class Interval(NamedTuple):
    """Per box, the closed range of a coordinate over its queries and over its keys."""

    q_lo: Tensor
    q_hi: Tensor
    k_lo: Tensor
    k_hi: Tensor


class Boxes(NamedTuple):
    """T boxes of pairs: batch entry, head, ranges of position and along each axis of the layout; all (T,)."""

    batch: Tensor
    head: Tensor
    position: Interval
    axes: tuple[Interval, ...] = ()


@dataclass(frozen=True, eq=False)
class Scene:
    """What a pattern may look at before it answers: lengths, the layout, and (for dynamic ones) q and k.

    Query i sits at position ``i + offset`` of the keys, so that the last query meets the last key.
    """

    num_queries: int
    num_keys: int
    layout: Layout = LINE
    q: Tensor | None = None  # (B, H, N, D)
    k: Tensor | None = None  # (B, G, M, D)
    scale: float | None = None
    first: int = 0  # position of key 0: a cache may have dropped those before it
    reach: int | None = None  # how far back whatever a pattern is joined with lets queries look

    @property
    def offset(self) -> int:
        return self.num_keys - self.num_queries


class Pattern:
    """Base of all patterns. Combine with ``&``, ``|``, ``~``; print it to see it as it was written.

    >>> from foveate import causal, sinks, window
    >>> window(512) & causal | sinks(4)
    window(512) & causal | sinks(4)
    """

    __slots__ = ()
    text: str
    batches: int = 1  # number of batch entries it tells apart (1: the same for all)
    heads: int = 1  # number of heads it tells apart
    is_dynamic: bool = False  # looks at q and k
    needs_axes: bool = False  # lives on a grid or on points
    sees_future: bool = True  # may show a key beyond the query
    chooses_ahead: bool = False  # its choice for a query may depend on later tokens
    may_change: bool = False  # reads what nothing tells the changes of: no selection of it is kept
    slow_because: str | None = None  # what makes it slow, in words
    depends_on: str = "position"  # or "distance", "order", or "slot": what padding, packing and caches never move
    counts_queries: bool = True  # what a query sees depends on where it stands among the keys
    by_number: bool = False  # tells documents apart by tables, which kernels run one document after the other

    # ---- the three questions -------------------------------------------------------------------------------

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        """Whether the query at position q sees the key at position k; all arguments broadcast."""
        raise NotImplementedError(f"{self} must be resolved before it can say what is visible")

    def bounds(self, boxes: Boxes) -> Bounds:
        """What holds for whole boxes; ``some`` may err towards True and ``every`` towards False."""
        unknown = torch.ones_like(boxes.position.q_lo, dtype=torch.bool)
        return Bounds(some=unknown, every=~unknown)

    def signature(self, boxes: Boxes) -> Tensor:
        """An integer per box; equal integers promise equal masks inside tiles of equal shape."""
        at = boxes.position
        return mix_hash(boxes.batch, boxes.head, at.q_lo, at.k_lo)

    def resolve(self, scene: Scene) -> Pattern:
        """This pattern with the layout bound and every data-dependent choice taken."""
        return self

    def looking_back(self) -> Pattern:
        """This pattern where nothing after the query may be seen: what it chooses, it chooses among earlier keys."""
        return self

    def spread(self, heads: int) -> Pattern:
        """This pattern told apart for so many heads, a multiple of its own: neighbours that shared it keep doing so."""
        if self.heads not in (1, heads):
            raise ValueError(f"{self} tells apart {self.heads} heads, and what it is joined with {heads}")
        return self

    def places_tokens(self, num_keys: int) -> Place | None:
        """Where tokens live, of a pattern that says so: what it is joined with by ``&`` counts positions there."""
        return None

    # ---- what users call -----------------------------------------------------------------------------------

    def allows(
        self,
        q_index: Index,
        k_index: Index,
        *,
        batch: Index = 0,
        head: Index = 0,
        layout: Layout | None = None,
    ) -> Tensor:
        """Whether the query at position ``q_index`` may see the key at position ``k_index`` (broadcasting).

        >>> from foveate import window
        >>> window(2).allows(5, torch.arange(8))
        tensor([False, False, False,  True,  True,  True,  True,  True])
        """
        if self.is_dynamic:
            raise ValueError(f"{self} chooses from q and k: ask pattern.resolve(Scene(..., q=q, k=k)).allows(...)")
        q_index, k_index = torch.as_tensor(q_index), torch.as_tensor(k_index)
        most = int(max(q_index.max(), k_index.max())) + 1 if q_index.numel() and k_index.numel() else 1
        length = layout.length if layout is not None and layout.length is not None else most
        resolved = resolve(self, Scene(length, length, layout or LINE))
        seen = resolved.visible(batch, head, q_index, k_index)
        shape = torch.broadcast_shapes(seen.shape, q_index.shape, k_index.shape)
        return seen.expand(shape)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        layout: Layout | None = None,
        *,
        tile: int = 64,
        scale: float | None = None,
    ) -> Selection:
        """The tiles and columns that a kernel runs for these queries (B, H, N, D) and keys (B, G, M, D).

        >>> from foveate import causal, window
        >>> q = k = torch.randn(1, 2, 256, 16)
        >>> (window(32) & causal).select(q, k).num_tiles
        7
        """
        from foveate.patterns.select.build import select

        return select(self, q, k, layout, tile=tile, scale=scale)

    def mask(self, num_queries: int, num_keys: int | None = None, *, layout: Layout | None = None) -> Tensor:
        """Dense boolean mask, (batches, heads, N, M), True where visible; for small sizes and for looking at.

        >>> from foveate import causal
        >>> causal.mask(3)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
        """
        from foveate.patterns.select.dense import dense_mask

        scene = Scene(num_queries, num_queries if num_keys is None else num_keys, layout or LINE)
        return dense_mask(resolve(self, scene), scene)

    def draw(
        self,
        num_queries: int | None = None,
        num_keys: int | None = None,
        *,
        layout: Layout | None = None,
        path: str | PathLike[str] | None = None,
        head: int = 0,
    ) -> Drawing:
        """A picture of one head: ``print`` it, show it in a notebook, or name a ``path`` (.svg or .png).

        >>> from foveate import window
        >>> print(window(1).draw(4))
        window(1)
        <BLANKLINE>
        4 queries x 4 keys, 62.5% visible
        ██▄
         ▀██

        Sizes default to those of the layout, or to 64; on a grid it also shows what the middle query sees.
        """
        from foveate.patterns.drawing.draw import draw

        drawing = draw(self, num_queries, num_keys, layout=layout, head=head)
        if path is not None:
            drawing.save(path)
        return drawing

    @property
    def is_causal(self) -> bool:
        """True if no query ever sees, or is influenced in its choice by, a later token."""
        return not (self.sees_future or self.chooses_ahead)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors the pattern holds; such a pattern equals only those that hold the very same."""
        return ()

    def __and__(self, other: Pattern) -> Pattern:
        from foveate.patterns.compound import And, joined

        return joined(And, self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        from foveate.patterns.compound import Or, joined

        return joined(Or, self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        from foveate.patterns.compound import Not

        return Not(self)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text

    def _repr_svg_(self) -> str | None:
        """The picture that a notebook shows; None where there is none without a layout, or without q and k."""
        try:
            return self.draw().svg
        except (ValueError, NotImplementedError):
            return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        return self is other or (type(self) is type(other) and same(fields_of(self), fields_of(other)))

    def __hash__(self) -> int:
        return hash(self.text)  # cheap; equal patterns print alike


def resolve(pattern: Pattern, scene: Scene) -> Pattern:
    """Resolve a pattern on a scene; a packed layout keeps its documents apart by itself."""
    from foveate.patterns.rules.listed import documents

    scene.layout.check(scene.num_keys)
    if scene.layout.packed_lengths is not None:
        pattern = pattern & documents(scene.layout.packed_lengths)
    return pattern.resolve(scene)


def mix_hash(*values: Tensor) -> Tensor:
    """One well-mixed 64-bit integer from several (the splitmix64 finaliser, wrapping).

    It starts from an odd constant: from 0 it would map 0 to 0, and hashes of hashes would collide.
    """
    mixed = torch.full_like(values[0], 0x243F6A8885A308D3, dtype=torch.long)
    for value in values:
        mixed = (mixed + value) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
        mixed = mixed ^ (mixed >> 27 & 0x1FFFFFFFFF)
    return mixed
