"""The algebra of patterns: which pairs (query, key) are visible.

A pattern is a tree of leaves joined by ``&``, ``|``, ``~`` and ``per_head``. Three questions are asked of it:

- ``visible``: is this pair allowed? Elementwise over index tensors; the definition.
- ``bounds``: of a box of pairs, may some be visible, are surely all? Interval reasoning; never touches pairs.
- ``signature``: tiles with equal signatures hold equal masks, so each distinct mask is evaluated once.

A pattern that needs more than positions (a grid, the queries and keys themselves) is first ``resolve``d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from foveate.patterns.layouts import Layout, Sequence

if TYPE_CHECKING:
    from foveate.patterns.selection import Selection

Index = Tensor | int

EMPTY, FILLED = -1, -2  # signatures of settled boxes


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
    """T boxes of pairs: batch entry, head, position ranges, and ranges along each axis of the layout; all (T,)."""

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
    layout: Layout = Sequence()
    q: Tensor | None = None  # (B, H, N, D)
    k: Tensor | None = None  # (B, G, M, D)
    scale: float | None = None

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

    # ---- what users call -----------------------------------------------------------------------------------

    def allows(
        self, q_index: Index, k_index: Index, *, batch: Index = 0, head: Index = 0, layout: Layout | None = None
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
        resolved = resolve(self, Scene(length, length, layout or Sequence()))
        seen = resolved.visible(batch, head, q_index, k_index)
        shape = torch.broadcast_shapes(seen.shape, q_index.shape, k_index.shape)
        return seen.expand(shape)

    def select(
        self, q: Tensor, k: Tensor, layout: Layout | None = None, *, tile: int = 64, scale: float | None = None
    ) -> Selection:
        """The tiles and columns that a kernel runs for these queries (B, H, N, D) and keys (B, G, M, D).

        >>> from foveate import causal, window
        >>> q = k = torch.randn(1, 2, 256, 16)
        >>> (window(32) & causal).select(q, k).num_tiles
        7
        """
        from foveate.patterns.build import select

        return select(self, q, k, layout, tile=tile, scale=scale)

    def mask(self, num_queries: int, num_keys: int | None = None, *, layout: Layout | None = None) -> Tensor:
        """Dense boolean mask, (batches, heads, N, M), True where visible; for small sizes and for looking at.

        >>> from foveate import causal
        >>> causal.mask(3)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
        """
        from foveate.patterns.dense import dense_mask

        scene = Scene(num_queries, num_queries if num_keys is None else num_keys, layout or Sequence())
        return dense_mask(resolve(self, scene), scene)

    @property
    def is_causal(self) -> bool:
        """True if no query ever sees, or is influenced in its choice by, a later token."""
        return not (self.sees_future or self.chooses_ahead)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors the pattern holds; such a pattern equals only itself and is never cached."""
        return ()

    def __and__(self, other: Pattern) -> Pattern:
        return All(_flatten(All, self, other)) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Any(_flatten(Any, self, other)) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return Not(self)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        same_tensors = len(self.tensors) == len(other.tensors) and all(
            mine is theirs for mine, theirs in zip(self.tensors, other.tensors, strict=True)
        )
        return self.text == other.text and same_tensors

    def __hash__(self) -> int:
        return hash(self.text)


def resolve(pattern: Pattern, scene: Scene) -> Pattern:
    """Resolve a pattern on a scene; a packed layout keeps its documents apart by itself."""
    from foveate.patterns.layouts import Packed
    from foveate.patterns.sequence import documents

    scene.layout.check(scene.num_keys)
    if isinstance(scene.layout, Packed):
        pattern = pattern & documents(scene.layout.lengths)
    return pattern.resolve(scene)


class Compound(Pattern):
    """A pattern made of parts."""

    __slots__ = ("parts", "text")
    parts: tuple[Pattern, ...]

    def __init__(self, parts: tuple[Pattern, ...]) -> None:
        self.parts = parts
        self.text = self._write()
        for name in ("batches", "heads"):
            counts = {getattr(part, name) for part in parts} - {1}
            if len(counts) > 1:
                raise ValueError(f"{self.text} joins patterns for different numbers of {name}: {sorted(counts)}")

    def _write(self) -> str:
        raise NotImplementedError

    @property
    def batches(self) -> int:  # type: ignore[override]
        return max(part.batches for part in self.parts)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return max(part.heads for part in self.parts)

    @property
    def is_dynamic(self) -> bool:  # type: ignore[override]
        return any(part.is_dynamic for part in self.parts)

    @property
    def needs_axes(self) -> bool:  # type: ignore[override]
        return any(part.needs_axes for part in self.parts)

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return any(part.sees_future for part in self.parts)

    @property
    def chooses_ahead(self) -> bool:  # type: ignore[override]
        return any(part.chooses_ahead for part in self.parts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    def resolve(self, scene: Scene) -> Pattern:
        return type(self)(tuple(part.resolve(scene) for part in self.parts))

    def signature(self, boxes: Boxes) -> Tensor:
        return mix_hash(*(settled_signature(part, boxes) for part in self.parts))


class All(Compound):
    """``a & b``: visible where every part is."""

    __slots__ = ()

    def _write(self) -> str:
        return " & ".join(f"({p})" if isinstance(p, Any) else p.text for p in self.parts)

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return all(part.sees_future for part in self.parts)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        seen = self.parts[0].visible(batch, head, q, k)
        for part in self.parts[1:]:
            seen = seen & part.visible(batch, head, q, k)
        return seen

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        for part in self.parts[1:]:
            more = part.bounds(boxes)
            some, every = some & more.some, every & more.every
        return Bounds(some, every)


class Any(Compound):
    """``a | b``: visible where at least one part is."""

    __slots__ = ()

    def _write(self) -> str:
        return " | ".join(p.text for p in self.parts)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        seen = self.parts[0].visible(batch, head, q, k)
        for part in self.parts[1:]:
            seen = seen | part.visible(batch, head, q, k)
        return seen

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        for part in self.parts[1:]:
            more = part.bounds(boxes)
            some, every = some | more.some, every | more.every
        return Bounds(some, every)


class Not(Compound):
    """``~a``: visible where the part is not."""

    __slots__ = ()

    def __init__(self, part: Pattern | tuple[Pattern, ...]) -> None:
        super().__init__(part if isinstance(part, tuple) else (part,))

    def _write(self) -> str:
        (part,) = self.parts
        return f"~({part})" if isinstance(part, (All, Any)) else f"~{part}"

    @property
    def sees_future(self) -> bool:  # type: ignore[override]
        return True

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        return ~self.parts[0].visible(batch, head, q, k)

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        return Bounds(some=~every, every=~some)


class PerHead(Compound):
    """Another pattern for each head."""

    __slots__ = ()

    def __init__(self, parts: tuple[Pattern, ...]) -> None:
        if any(part.heads not in (1, len(parts)) for part in parts):
            raise ValueError("a pattern inside per_head must hold for one head or tell apart all of them")
        super().__init__(parts)

    def _write(self) -> str:
        return f"per_head([{', '.join(p.text for p in self.parts)}])"

    @property
    def heads(self) -> int:  # type: ignore[override]
        return len(self.parts)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        if isinstance(head, int):
            return self.parts[head].visible(batch, head, q, k)
        seen = self.parts[0].visible(batch, head, q, k)
        for number, part in enumerate(self.parts[1:], start=1):
            seen = torch.where(head == number, part.visible(batch, head, q, k), seen)
        return seen

    def bounds(self, boxes: Boxes) -> Bounds:
        some, every = self.parts[0].bounds(boxes)
        for number, part in enumerate(self.parts[1:], start=1):
            own, here = part.bounds(boxes), boxes.head == number
            some, every = torch.where(here, own.some, some), torch.where(here, own.every, every)
        return Bounds(some, every)

    def signature(self, boxes: Boxes) -> Tensor:
        signature = settled_signature(self.parts[0], boxes)
        for number, part in enumerate(self.parts[1:], start=1):
            own = settled_signature(part, boxes)
            settled = (own == EMPTY) | (own == FILLED)
            named = torch.where(settled, own, mix_hash(own, torch.full_like(own, self.parts.index(part))))
            signature = torch.where(boxes.head == number, named, signature)
        return signature


def per_head(patterns: list[Pattern] | tuple[Pattern, ...]) -> Pattern:
    """Another pattern for each query head, in order.

    >>> from foveate import causal, window
    >>> per_head([window(16), window(64)]) & causal
    per_head([window(16), window(64)]) & causal

    Raises ValueError on an empty list, TypeError on anything that is not a pattern.
    """
    parts = tuple(patterns)
    if not parts:
        raise ValueError("per_head takes one pattern for each head; got an empty list")
    for part in parts:
        if not isinstance(part, Pattern):
            raise TypeError(f"per_head takes patterns such as window(64); got {part!r}")
    return parts[0] if len(parts) == 1 else PerHead(parts)


def settled_signature(part: Pattern, boxes: Boxes) -> Tensor:
    """A part's signature, coarsened where its bounds already settle the box as empty or full."""
    some, every = part.bounds(boxes)
    signature = part.signature(boxes)
    signature = torch.where(some, signature, torch.full_like(signature, EMPTY))
    return torch.where(every, torch.full_like(signature, FILLED), signature)


def mix_hash(*values: Tensor) -> Tensor:
    """One well-mixed 64-bit integer from several (the splitmix64 finaliser, wrapping)."""
    mixed = torch.zeros_like(values[0], dtype=torch.long)
    for value in values:
        mixed = (mixed + value) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
        mixed = mixed ^ (mixed >> 27 & 0x1FFFFFFFFF)
    return mixed


def _flatten(kind: type[Compound], *patterns: Pattern) -> tuple[Pattern, ...]:
    """Nested parts of one kind as one list, so that ``(a | b) | c`` equals ``a | (b | c)``."""
    parts: list[Pattern] = []
    for pattern in patterns:
        parts.extend(pattern.parts if type(pattern) is kind else (pattern,))  # type: ignore[attr-defined]
    return tuple(parts)
