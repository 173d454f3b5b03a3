"""Attention document by document: how the kernels run patterns whose positions, or choices, are those of documents.

Padding, packed sequences and caches that have dropped keys say where documents lie. Masks alone go to the kernels as
part of one selection; a pattern that means positions, or that chooses, runs on each document as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.attention.bias import Bias
from foveate.attention.call import Call
from foveate.attention.dropout import Dropout
from foveate.attention.impl.definition import definition, with_parameters
from foveate.attention.impl.plan import ByDocument, Kernels, Piece, Plan
from foveate.attention.partial import sums_dtype
from foveate.attention.weights import Kind
from foveate.layouts.kinds import Layout, Points
from foveate.layouts.place import Document, Place, Slots
from foveate.patterns.algebra import LINE, Pattern, Scene
from foveate.patterns.compound import And, leaves, reach_of
from foveate.patterns.part import Part
from foveate.patterns.placed import check_complete, moves, split


def plan(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    layout: Layout,
    biases: tuple[Bias, ...],
    kind: Kind,
    scale: float,
    softcap: float | None,
    dropout: Dropout | None,
) -> Plan:
    """What the kernels run: of the whole call, or of each of its documents."""
    scene = Scene(q.shape[2], k.shape[2], layout, q, k, scale)
    rest, place = split(pattern, layout, scene.num_keys)
    plain = kind == "softmax" and softcap is None
    if isinstance(layout, Points) and layout.is_batched and _runs_by_cloud(rest, place, biases, dropout is not None):
        clouds = _clouds(kernels, q, k, rest, place, layout, scale, plain)
        return Plan(ByDocument(tuple(clouds)), biases, kind, scale, softcap, dropout)
    if place is None or not _runs_by_document(pattern, rest, place, biases, dropout is not None, scene):
        selected = kernels.select(q, k, pattern, layout, scale, plain=plain, biases=biases)
    else:
        selected = ByDocument(tuple(_pieces(kernels, q, k, rest, place, scale, plain)))
    return Plan(selected, biases, kind, scale, softcap, dropout)


def _pieces(
    kernels: Kernels, q: Tensor, k: Tensor, rest: Pattern, place: Place, scale: float, plain: bool
) -> Iterator[Piece]:
    for document in place.documents:
        queries = document.queries(k.shape[2] - q.shape[2])
        own_q, own_k = q[document.batch, :, queries], k[document.batch, :, document.slots]
        if own_q.shape[2]:
            inside = _at_positions(rest, document, own_q, own_k, scale)
            selected = kernels.select(own_q, own_k, inside, LINE, scale, plain=plain)
            yield Piece(document.batch, queries, document.slots, selected)


def _runs_by_cloud(rest: Pattern, place: Place | None, biases: Sequence[Bias], drops: bool) -> bool:
    """Whether each batch entry's cloud, with an order of its own, is attended as if it were alone."""
    if rest.batches > 1 or any(leaf.depends_on == "slot" for leaf in leaves(rest)):
        return False
    if place is None:
        return True
    whole = place.is_consecutive and all(document.first == 0 for document in place.documents)
    return whole and all(bias.in_documents(place) for bias in biases) and not drops


def _clouds(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    rest: Pattern,
    place: Place | None,
    layout: Points,
    scale: float,
    plain: bool,
) -> Iterator[Piece]:
    every = Document(slice(None), slice(0, k.shape[2]), 0, True)
    for document in [every] if place is None else place.documents:
        for entry in range(*document.batch.indices(q.shape[0])):
            batch, queries = slice(entry, entry + 1), document.queries(k.shape[2] - q.shape[2])
            own_q, own_k = q[batch, :, queries], k[batch, :, document.slots]
            if own_q.shape[2]:
                cloud = Points(layout.entry(entry).coords[document.slots])
                selected = kernels.select(own_q, own_k, rest, cloud, scale, plain=plain)
                yield Piece(batch, queries, document.slots, selected)


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
    reach = reach_of(rest.parts if isinstance(rest, And) else (rest,), None)
    for leaf in leaves(rest):
        check_complete(leaf, document, scene.offset, reach)
    return Part(rest.resolve(scene), str(rest), document.first + scene.offset, 1, document.first, scene.offset)


def forward(kernels: Kernels, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads out (B, H, N, Dv) and log row sums (B, H, N); padding gets zeros, and no weight."""
    if not isinstance(plan.selected, ByDocument):
        return kernels.forward(plan, q, k, v)
    empty = float("-inf") if plan.kind == "softmax" else 0.0
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], empty, dtype=sums_dtype(q), device=q.device)
    for piece in plan.selected.pieces:
        tensors = piece.part(q, piece.queries), piece.part(k, piece.keys), piece.part(v, piece.keys)
        at = piece.batch, slice(None), piece.queries
        out[at], lse[at] = kernels.forward(_plan_of(plan, piece, q, k), *tensors)
    return out, lse


def backward(
    kernels: Kernels,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of each bias's parameter."""
    if not isinstance(plan.selected, ByDocument):
        return kernels.backward(plan, q, k, v, out, lse, grad_out, grad_lse)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_biases = [torch.zeros_like(bias.parameter, memory_format=torch.contiguous_format) for bias in plan.biases]
    for piece in plan.selected.pieces:
        of_queries = [piece.part(x, piece.queries) for x in (out, lse, grad_out, grad_lse)]
        tensors = piece.part(q, piece.queries), piece.part(k, piece.keys), piece.part(v, piece.keys)
        own_dq, own_dk, own_dv, *own = kernels.backward(_plan_of(plan, piece, q, k), *tensors, *of_queries)
        dq[piece.batch, :, piece.queries] = own_dq
        dk[piece.batch, :, piece.keys], dv[piece.batch, :, piece.keys] = own_dk, own_dv
        for bias, total, grad in zip(plan.biases, d_biases, own, strict=True):
            bias.of_document(total, piece.batch, piece.queries, piece.keys).add_(grad)
    return (dq, dk, dv, *d_biases)


def _plan_of(plan: Plan, piece: Piece, q: Tensor, k: Tensor) -> Plan:
    def count(at: Slots, length: int) -> int:
        return len(range(*at.indices(length))) if isinstance(at, slice) else at.numel()

    offset = count(piece.keys, k.shape[2]) - count(piece.queries, q.shape[2])
    biases = []
    for bias in plan.biases:
        parameter = bias.of_document(bias.parameter, piece.batch, piece.queries, piece.keys)
        biases.append(bias.moved(parameter, offset))
    return plan._replace(selected=piece.selected, biases=tuple(biases), dropout=_dropout_of(plan.dropout, piece))


def _dropout_of(dropout: Dropout | None, piece: Piece) -> Dropout | None:
    """A pair is dropped by its numbers in the whole call."""
    if dropout is None:
        return None
    assert isinstance(piece.queries, slice) and isinstance(piece.keys, slice)
    query, key = dropout.query + piece.queries.start, dropout.key + piece.keys.start
    return dropout._replace(batch=dropout.batch + (piece.batch.start or 0), query=query, key=key)


class Attend(NamedTuple):
    """A planned call as autograd takes it; its inputs are q, k, v and the parameters of its biases."""

    kernels: Kernels
    plan: Plan

    def forward(self, *inputs: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = forward(self.kernels, self.plan, *inputs[:3])  # type: ignore[arg-type]
        return outputs, outputs

    def backward(
        self, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        plan = with_parameters(self.plan, inputs[3:])
        return backward(self.kernels, plan, *inputs[:3], *saved, *grads)  # type: ignore[arg-type]

    def definition(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return definition(self.plan, *inputs)
