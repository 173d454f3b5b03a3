"""Attention document by document: how the kernels run patterns whose positions, or choices, are those of documents.

Padding, packed sequences and caches that have dropped keys say where documents lie. Masks alone go to the kernels as
part of one selection; a pattern that means positions, or that chooses, runs on each document as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.attention.bias import Bias
from foveate.attention.dropout import Dropout
from foveate.attention.partial import sums_dtype
from foveate.layouts.kinds import Layout
from foveate.layouts.place import Document, Place, Slots
from foveate.patterns.algebra import LINE, Pattern, Scene
from foveate.patterns.compound import All, leaves, reach_of
from foveate.patterns.part import Part
from foveate.patterns.placed import check_complete, moves, split

if TYPE_CHECKING:
    from foveate.attention.call import Call
    from foveate.attention.impl.spec import Kernels, Seen, Spec


@dataclass(frozen=True, eq=False)
class Piece:
    """One document of a call: its batch entries, its queries and keys, and what the kernels see of it."""

    batch: slice
    queries: Slots
    keys: Slots
    seen: Seen

    def part(self, x: Tensor, at: Slots) -> Tensor:
        """Of (B, H, N, ...) the tokens of this document."""
        return x[self.batch, :, at]


@dataclass(frozen=True, eq=False)
class ByDocument:
    """What the kernels run one after the other; every token is in one piece at most."""

    pieces: tuple[Piece, ...]


def see(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    layout: Layout,
    scale: float,
    *,
    biases: Sequence[Bias],
    plain: bool,
    drops: bool,
) -> Seen | ByDocument:
    """What the kernels run: of the whole call, or of each of its documents."""
    scene = Scene(q.shape[2], k.shape[2], layout, q, k, scale)
    rest, place = split(pattern, layout, scene.num_keys)
    if place is None or not _runs_by_document(pattern, rest, place, biases, drops, scene):
        return kernels.sees(q, k, pattern, layout, scale, plain=plain)
    pieces = []
    for document in place.documents:
        queries = document.queries(scene.offset)
        piece = Piece(document.batch, queries, document.slots, None)  # type: ignore[arg-type]
        own_q, own_k = piece.part(q, queries), piece.part(k, document.slots)
        if own_q.shape[2]:
            inside = _at_positions(rest, document, own_q, own_k, scale)
            seen = kernels.sees(own_q, own_k, inside, LINE, scale, plain=plain)
            pieces.append(Piece(document.batch, queries, document.slots, seen))
    return ByDocument(tuple(pieces))


def _runs_by_document(
    pattern: Pattern, rest: Pattern, place: Place, biases: Sequence[Bias], drops: bool, scene: Scene
) -> bool:
    parts = list(leaves(rest))
    if any(leaf.depends_on == "slot" or leaf.needs_axes for leaf in parts) or scene.layout.num_axes:
        return False  # what is said of slots holds for the whole call
    if not place.is_consecutive:
        return False
    if not all(bias.in_documents(place) for bias in biases) or (drops and not place.keeps_distances):
        return False
    return any(leaf.by_number for leaf in leaves(pattern)) or any(moves(leaf, place, scene) for leaf in parts)


def runs_by_document(call: Call) -> bool:
    """Whether the kernels run a call one document after the other."""
    scene = Scene(call.num_queries, call.num_keys, call.layout, call.q, call.k, call.scale)
    rest, place = split(call.pattern, call.layout, call.num_keys)
    drops = call.dropout is not None
    return place is not None and _runs_by_document(call.pattern, rest, place, call.biases, drops, scene)


def _at_positions(rest: Pattern, document: Document, q: Tensor, k: Tensor, scale: float) -> Pattern:
    """The pattern as a document sees it whose first keys are gone."""
    if document.first == 0 or all(leaf.depends_on in ("order", "distance") for leaf in leaves(rest)):
        return rest
    scene = Scene(q.shape[2], k.shape[2], LINE, q.detach(), k.detach(), scale, first=document.first)
    reach = reach_of(rest.parts if isinstance(rest, All) else (rest,), None)
    for leaf in leaves(rest):
        check_complete(leaf, document, scene.offset, reach)
    return Part(rest.resolve(scene), str(rest), document.first + scene.offset, 1, document.first, scene.offset)


def forward(kernels: Kernels, spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads out (B, H, N, Dv) and log row sums (B, H, N); padding gets zeros, and no weight."""
    if not isinstance(spec.seen, ByDocument):
        return kernels.forward(spec, q, k, v)
    empty = float("-inf") if spec.kind == "softmax" else 0.0
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], empty, dtype=sums_dtype(q), device=q.device)
    for piece in spec.seen.pieces:
        tensors = piece.part(q, piece.queries), piece.part(k, piece.keys), piece.part(v, piece.keys)
        at = piece.batch, slice(None), piece.queries
        out[at], lse[at] = kernels.forward(_spec_of(spec, piece, q, k), *tensors)
    return out, lse


def backward(
    kernels: Kernels,
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of each bias's parameter."""
    if not isinstance(spec.seen, ByDocument):
        return kernels.backward(spec, q, k, v, out, lse, grad_out, grad_lse)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_biases = [torch.zeros_like(bias.parameter, memory_format=torch.contiguous_format) for bias in spec.biases]
    for piece in spec.seen.pieces:
        of_queries = [piece.part(x, piece.queries) for x in (out, lse, grad_out, grad_lse)]
        tensors = piece.part(q, piece.queries), piece.part(k, piece.keys), piece.part(v, piece.keys)
        own_dq, own_dk, own_dv, *own = kernels.backward(_spec_of(spec, piece, q, k), *tensors, *of_queries)
        dq[piece.batch, :, piece.queries] = own_dq
        dk[piece.batch, :, piece.keys], dv[piece.batch, :, piece.keys] = own_dk, own_dv
        for bias, total, grad in zip(spec.biases, d_biases, own, strict=True):
            bias.of_document(total, piece.batch, piece.queries, piece.keys).add_(grad)
    return (dq, dk, dv, *d_biases)


def visible(seen: ByDocument, q: Tensor, k: Tensor) -> Tensor:
    """The dense mask (B, H, N, M) of what was selected."""
    from foveate.attention.impl import spec

    mask = torch.zeros((*q.shape[:3], k.shape[2]), dtype=torch.bool, device=q.device)
    for piece in seen.pieces:
        own = spec.visible(piece.seen, piece.part(q, piece.queries), piece.part(k, piece.keys))
        queries = torch.arange(q.shape[2], device=q.device)[piece.queries]
        keys = torch.arange(k.shape[2], device=q.device)[piece.keys]
        mask[piece.batch, :, queries[:, None], keys] = own
    return mask


def _spec_of(spec: Spec, piece: Piece, q: Tensor, k: Tensor) -> Spec:
    def count(at: Slots, length: int) -> int:
        return len(range(*at.indices(length))) if isinstance(at, slice) else at.numel()

    offset = count(piece.keys, k.shape[2]) - count(piece.queries, q.shape[2])
    biases = []
    for bias in spec.biases:
        parameter = bias.of_document(bias.parameter, piece.batch, piece.queries, piece.keys)
        biases.append(bias.moved(parameter, offset))
    return spec._replace(seen=piece.seen, biases=tuple(biases), dropout=_dropout_of(spec.dropout, piece))


def _dropout_of(dropout: Dropout | None, piece: Piece) -> Dropout | None:
    """A pair is dropped by its numbers in the whole call."""
    if dropout is None:
        return None
    assert isinstance(piece.queries, slice) and isinstance(piece.keys, slice)
    return dropout._replace(batch=piece.batch.start or 0, query=piece.queries.start, key=piece.keys.start)
