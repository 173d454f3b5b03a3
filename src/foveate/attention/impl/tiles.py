"""attend in pure torch: the selected tiles and columns are gathered and batched, forward and backward.

Memory is linear in N and M; masked pairs inside a tile are computed and dropped, unlisted tiles never.
Logits are formed in float32 (float64 for float64 inputs) and recomputed in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.bias import Bias
from foveate.attention.call import Call
from foveate.attention.impl.plan import Plan
from foveate.attention.impl.rows import Batch, Rows, Sharing, Slotted, add_rows
from foveate.attention.partial import sums_dtype
from foveate.attention.weights import Kind
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.select.selection import TILE, Selection
from foveate.precision import accum_dtype


def refuse(call: Call) -> None:
    """Nothing but what no kernel runs."""


def in_known_terms(call: Call) -> Call:
    """As it is: any bias says its values."""
    return call


def select(
    q: Tensor, k: Tensor, pattern: Pattern, layout: Layout, scale: float, *, plain: bool, biases: tuple[Bias, ...] = ()
) -> Selection:
    """The pattern's selection."""
    return pattern.select(q, k, layout, tile=TILE, scale=scale)


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads out (B, H, N, Dv) and log row sums (B, H, N) (zeros for unnormalised weights)."""
    work = _Work(plan, q, k, v)
    rows = work.rows.num_rows
    out = work.q.new_zeros(rows, work.fold * work.tile, v.shape[-1])
    nothing = float("-inf") if plan.kind == "softmax" else 0.0
    lse = work.q.new_full((rows, work.fold * work.tile), nothing, dtype=sums_dtype(q))
    for batch in work.rows.batches():
        logits, _ = work.logits(batch)
        values = work.gather(work.v, batch, work.value_head(batch))
        dropped = work.dropped(batch)
        if plan.kind == "softmax":
            _accumulate(out, lse, batch.rows, logits, values, dropped)
        else:
            weights = logits.sigmoid_() if plan.kind == "sigmoid" else logits.relu_()
            out[batch.rows] += (weights if dropped is None else weights.mul_(dropped)) @ values
    return work.unfold(out, q.dtype), work.unfold(lse.unsqueeze(-1), lse.dtype).squeeze(-1)


def _accumulate(out: Tensor, lse: Tensor, rows: Tensor, logits: Tensor, values: Tensor, dropped: Tensor | None) -> None:
    """Online softmax: join the weights of these keys to what the rows have so far."""
    before = lse[rows]
    top = torch.maximum(logits.amax(-1), before.to(logits.dtype))
    top = torch.where(top.isneginf(), 0.0, top)
    weights = logits.sub_(top.unsqueeze(-1)).exp_()
    kept = (before - top).exp().to(logits.dtype)
    total = kept + weights.sum(-1)
    weights = weights if dropped is None else weights.mul_(dropped)
    joined = torch.baddbmm(out.index_select(0, rows) * kept.unsqueeze(-1), weights, values)
    out[rows] = joined / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    lse[rows] = top + total.to(lse.dtype).log()


def backward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of each bias's parameter."""
    work = _Work(plan, q, k, v)
    grad_rows, lse_rows = work.folded(grad_out), work.folded(lse.unsqueeze(-1), lse.dtype).squeeze(-1)
    row_term = (grad_out * out).sum(-1, dtype=work.q.dtype)
    delta = work.folded((row_term - grad_lse).unsqueeze(-1)).squeeze(-1)
    grad_rows = work.finite_rows(grad_rows)
    dq, dk, dv = (torch.zeros_like(x) for x in (work.q, work.k, work.v))
    d_biases = [torch.zeros_like(b.parameter, dtype=work.q.dtype).flatten() for b in plan.biases]
    for batch in work.rows.batches():
        logits, slope = work.logits(batch)
        rows = batch.rows
        weights, to_logits = _weights(plan.kind, logits, lse_rows[rows])
        work.unsee(batch, weights)
        grad = grad_rows.index_select(0, rows)
        dropped = work.dropped(batch)
        used = weights if dropped is None else weights * dropped
        work.scatter(dv, batch, work.value_head(batch), used.transpose(1, 2) @ grad)
        d_weights = torch.bmm(grad, work.gather(work.v, batch, work.value_head(batch)).transpose(1, 2))
        if dropped is not None:
            d_weights *= dropped
        if plan.kind == "softmax":
            d_weights -= delta[rows].unsqueeze(-1)
        d_logits = d_weights.mul_(to_logits)
        work.unsee(batch, d_logits)
        work.add_bias_grads(d_biases, batch, d_logits)
        d_scores = d_logits.mul_(plan.scale) if slope is None else d_logits.mul_(slope).mul_(plan.scale)
        dq[rows] += d_scores @ work.gather(work.k, batch, work.key_head(batch))
        work.scatter(dk, batch, work.key_head(batch), d_scores.transpose(1, 2) @ work.q.index_select(0, rows))
    d_parameters = [g.view_as(b.parameter).to(b.parameter.dtype) for g, b in zip(d_biases, plan.biases, strict=True)]
    keys = (work.keys.back(x).to(q.dtype) for x in (dk, dv))
    return (work.unfold(dq, q.dtype), *keys, *d_parameters)


def _weights(kind: Kind, logits: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, and their derivative by the logits up to softmax's row term."""
    if kind == "softmax":
        lse = torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1)
        near = lse.to(logits.dtype)
        relative = logits.sub_(near).sub_((lse - near).to(logits.dtype))
        weights = relative.clamp_max_(0).exp_()  # above 0 only in empty slots, which a bias may raise to infinity
        return weights, weights
    if kind == "sigmoid":
        weights = logits.sigmoid_()
        return weights, weights * (1 - weights)
    weights = logits.relu_()
    return weights, (weights > 0).to(weights.dtype)


class _Work:
    """A call's tensors in slot order, with queries folded into rows: q (rows, fold * tile, D)."""

    def __init__(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> None:
        chosen = plan.selected
        assert isinstance(chosen, Selection)
        self.plan, self.tile = plan, chosen.tile
        self.sharing = Sharing.of(chosen.heads, q, k, v)
        self.fold = self.sharing.fold
        self.rows = Rows(chosen, self.sharing)
        self.queries = Slotted(chosen.q_slots, chosen.num_queries, chosen.tile)
        self.keys = Slotted(chosen.k_slots, chosen.num_keys, chosen.tile)
        self.precise = accum_dtype(q)
        self.q = self.folded(q)
        self.k, self.v = (self.keys.into(x).to(self.precise).contiguous() for x in (k, v))
        self.odd_rows: Tensor | None = None  # (rows, fold * tile): of queries that are not finite
        self.odd_keys: list[Tensor] | None = None  # (B, heads, M', 1) of keys and of values, 1 at what is not finite
        self.q = self.finite_rows(self.q)
        if not (bool(self.k.isfinite().all()) and bool(self.v.isfinite().all())):
            odd = [~x.isfinite().all(-1, keepdim=True) for x in (self.k, self.v)]
            self.k, self.v = self.k.masked_fill(odd[0], 0), self.v.masked_fill(odd[1], 0)
            self.odd_keys = [x.to(self.precise) for x in odd]

    def finite_rows(self, x: Tensor) -> Tensor:
        """Queries, or gradients of theirs, with zeros in rows that are not finite: all their weights become NaN.

        Products with what is not finite would be NaN also where a weight is 0, for pairs that do not see each other.
        """
        if bool(x.isfinite().all()):
            return x
        odd = ~x.isfinite().all(-1)
        self.odd_rows = odd if self.odd_rows is None else self.odd_rows | odd
        return x.masked_fill(odd.unsqueeze(-1), 0)

    def _spoil(self, logits: Tensor, batch: Batch) -> None:
        """NaN for pairs of which the query, the key or the value is not finite."""
        if self.odd_rows is not None:
            logits.masked_fill_(self.odd_rows.index_select(0, batch.rows).unsqueeze(-1), float("nan"))
        if self.odd_keys is not None:
            for odd, head in zip(self.odd_keys, (self.key_head(batch), self.value_head(batch)), strict=True):
                logits.masked_fill_(self.gather(odd, batch, head).transpose(1, 2) > 0, float("nan"))

    def unsee(self, batch: Batch, pairs: Tensor) -> None:
        """Zeros for hidden pairs of rows that are NaN otherwise."""
        if self.odd_rows is not None or self.odd_keys is not None:
            self._hide(pairs.view(-1, self.fold, self.tile, pairs.shape[-1]), batch, 0.0)

    def folded(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, H, N, X) to (rows, fold * tile, X), in the computing precision unless another is named."""
        share, tiles = self.sharing, self.rows.selection.num_q_tiles
        x = self.queries.into(x).to(dtype or self.precise)
        x = x.reshape(share.batch, share.sets, self.fold, tiles, self.tile, x.shape[3])
        return x.transpose(2, 3).reshape(self.rows.num_rows, self.fold * self.tile, x.shape[5])

    def unfold(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`folded`."""
        share, tiles = self.sharing, self.rows.selection.num_q_tiles
        x = x.view(share.batch, share.sets, tiles, self.fold, self.tile, x.shape[2]).transpose(2, 3)
        x = x.reshape(share.batch, share.sets * self.fold, tiles * self.tile, x.shape[5])
        return self.queries.back(x).to(dtype).contiguous()

    def key_head(self, batch: Batch) -> Tensor:
        share = self.sharing
        return batch.batch * share.key_heads + batch.head_set // (share.sets // share.key_heads)

    def value_head(self, batch: Batch) -> Tensor:
        share = self.sharing
        return batch.batch * share.value_heads + batch.head_set // (share.sets // share.value_heads)

    def gather(self, x: Tensor, batch: Batch, head: Tensor) -> Tensor:
        """Keys or values of each row, (R, L * tile + C, X)."""
        dim, num_slots = x.shape[-1], x.shape[-2]
        tiles = batch.tiles + (head * (num_slots // self.tile)).unsqueeze(1)
        found = x.view(-1, self.tile * dim).index_select(0, tiles.flatten()).view(tiles.shape[0], -1, dim)
        if batch.columns.shape[1] == 0:
            return found
        slots = batch.columns + (head * num_slots).unsqueeze(1)
        single = x.view(-1, dim).index_select(0, slots.flatten()).view(slots.shape[0], -1, dim)
        return torch.cat([found, single], dim=1)

    def scatter(self, total: Tensor, batch: Batch, head: Tensor, grad: Tensor) -> None:
        """Add gradients (R, L * tile + C, X) where :meth:`gather` took the keys or values from."""
        dim, num_slots = total.shape[-1], total.shape[-2]
        whole = batch.tiles.shape[1] * self.tile
        tiles = batch.tiles + (head * (num_slots // self.tile)).unsqueeze(1)
        of_tiles = grad[:, :whole].reshape(-1, self.tile * dim)
        add_rows(total.view(-1, self.tile * dim), tiles.flatten(), of_tiles)
        if batch.columns.shape[1]:
            slots = batch.columns + (head * num_slots).unsqueeze(1)
            add_rows(total.view(-1, dim), slots.flatten(), grad[:, whole:].reshape(-1, dim))

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits (R, fold * tile, keys), -inf where hidden, and the soft-cap's derivative (None without)."""
        keys = self.gather(self.k, batch, self.key_head(batch))
        q = self.q.index_select(0, batch.rows)
        logits = torch.baddbmm(q.new_empty(1), q, keys.transpose(1, 2), beta=0, alpha=self.plan.scale)
        slope = None
        if self.plan.softcap is not None:
            bent = logits.div_(self.plan.softcap).tanh_()
            slope = 1 - bent.square()
            logits = bent * self.plan.softcap
        by_head = logits.view(-1, self.fold, self.tile, logits.shape[-1])
        for bias in self.plan.biases:
            by_head += bias.values(*self._indices(batch)).to(logits.dtype)
        self._spoil(logits, batch)
        self._hide(by_head, batch, float("-inf"))
        return logits, slope

    def dropped(self, batch: Batch) -> Tensor | None:
        """What dropout multiplies the weights by (R, fold * tile, keys); None without."""
        if self.plan.dropout is None:
            return None
        return self.plan.dropout.factor(*self._indices(batch), self.precise).flatten(1, 2)

    def _hide(self, by_head: Tensor, batch: Batch, value: float) -> None:
        masked, whole = batch.hidden_tiles.shape[-1], batch.tiles.shape[1] * self.tile
        if masked:
            by_head[..., :masked].masked_fill_(batch.hidden_tiles.unsqueeze(1), value)
        if batch.columns.shape[1]:
            by_head[..., whole:].masked_fill_(batch.hidden_columns.unsqueeze(1), value)

    def add_bias_grads(self, totals: list[Tensor], batch: Batch, d_logits: Tensor) -> None:
        by_head = d_logits.view(-1, self.fold, self.tile, d_logits.shape[-1])
        for bias, total in zip(self.plan.biases, totals, strict=True):
            bias.add_grad(total, by_head, *self._indices(batch))

    def _indices(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch entry, query head, query and key of each logit, broadcasting to (R, fold, tile, keys)."""
        fold = torch.arange(self.fold, device=batch.rows.device)
        head = batch.head_set.unsqueeze(1) * self.fold + fold
        q = self.queries.positions(batch.q_tile, self.tile)
        tiles = self.keys.positions(batch.tiles, self.tile).flatten(1)
        k = torch.cat([tiles, self.keys.tokens(batch.columns)], dim=1)
        return batch.batch.view(-1, 1, 1, 1), head[:, :, None, None], q[:, None, :, None], k[:, None, None, :]
