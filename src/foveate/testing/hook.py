"""check_hook: what every application in the catalogue must hold to: it runs at its shapes, and is its dense formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.adapt.named import as_core
from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import HookRow
from foveate.mixers.core import Core, joined
from foveate.patterns import Scene, Sequence, causal, full
from foveate.patterns.algebra import resolve
from foveate.testing.report import Report
from foveate.testing.suite import EXACT, Property, assert_equal, row_of, run_suite

ROWS, SINGLE = 48, 2e-4  # queries compared, and how close in float32, relative to the largest number


class Heads(NamedTuple):
    """Queries (B, H, N, D), keys and values (B, G, M, D)."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class HookSubject:
    """An application, at the sizes of tests in float64 or at its own in float32."""

    hook: Hook
    full: bool

    @cached_property
    def core(self) -> Core:
        return as_core(self.hook.operator, **self.hook.options)

    def heads(self, dtype: torch.dtype | None = None) -> Heads:
        hook = self.hook
        dtype = dtype or (torch.float32 if self.full else torch.float64)
        queries = (hook.batch, hook.heads, hook.queries or hook.keys, hook.head_dim)
        keys = (hook.batch, hook.kv_heads or hook.heads, hook.keys, hook.head_dim)
        return Heads(*(torch.randn(shape, dtype=dtype) for shape in (queries, keys, keys)))

    def run(self, heads: Heads) -> Tensor:
        bias = None if self.hook.bias is None else self.hook.bias.to(heads.q.dtype)
        return self.core(*heads, within=causal if self.hook.causal else full, layout=self.hook.layout, bias=bias)

    def dense(self, heads: Heads, rows: Tensor) -> Tensor:
        """Softmax of the whole table of logits for some queries, what the pattern hides left out."""
        q, (k, v) = heads.q, (self.for_each_head(one) for one in heads[1:])
        layout = self.hook.layout or Sequence()
        scene = Scene(q.shape[2], k.shape[2], layout, q.detach(), heads.k.detach(), None)
        pattern = resolve(joined(self.core.pattern, causal if self.hook.causal else full), scene)
        batch = torch.arange(pattern.batches).view(-1, 1, 1, 1)
        head = torch.arange(pattern.heads).view(1, -1, 1, 1)
        at = rows.view(1, 1, -1, 1) + scene.offset
        seen = pattern.visible(batch, head, at, torch.arange(k.shape[2]).view(1, 1, 1, -1))
        seen = seen.expand(-1, pattern.heads, -1, -1).repeat_interleave(q.shape[1] // pattern.heads, dim=1)
        logits = q[:, :, rows] @ k.mT / math.sqrt(q.shape[3])
        if self.hook.bias is not None:
            logits = logits + self.hook.bias[:, :, rows].to(logits.dtype)
        logits = logits.masked_fill(~seen, -torch.inf)
        return logits.softmax(-1).nan_to_num(0.0) @ v  # a query that sees nothing gives zeros

    def for_each_head(self, one: Tensor) -> Tensor:
        return one.repeat_interleave(self.hook.heads // one.shape[1], dim=1)

    @property
    def tolerance(self) -> float:
        return SINGLE if self.full else EXACT

    def some(self, heads: Heads) -> Tensor:
        """Numbers of some queries."""
        return torch.randperm(heads.q.shape[2])[:ROWS].sort().values


def check_hook(
    hook: HookRow | str | Callable[..., Hook],
    *,
    full: bool = False,
    seed: int | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Put an application's attention to what it must hold to: it runs, and equals the masked dense computation.

    Values and gradients are compared for some queries, in float64 at the sizes of its ``tiny``; with ``full`` in
    float32 at the application's own sizes, which takes its time and memory.

    Args:
        hook: its row, its name or the function that returns the `Hook`.
        full: whether to run at the application's own sizes.
        seed: of all random numbers; a fresh one by default. Every failure names it.
        raise_on_failure: whether a failure raises, or is only reported.

    Raises AssertionError naming each property that fails, with the numbers and the seed: so do cores that compute
    something else than exact attention over their pattern. TypeError for what is no hook of the catalogue.
    """
    row = row_of(hook, HookRow, "check_hook")
    subject = HookSubject(row.make(**({} if full else row.tiny)), full)
    return run_suite(row.name, subject, PROPERTIES, exempt=row.exempt, seed=seed, raise_on_failure=raise_on_failure)


@torch.no_grad()
def runs(subject: HookSubject) -> None:
    """In float32 and bfloat16 it gives finite numbers, a row for each query."""
    for dtype in (torch.float32, torch.bfloat16):
        heads = subject.heads(dtype)
        out = subject.run(heads)
        assert out.shape == heads.q.shape, f"queries {tuple(heads.q.shape)} give {tuple(out.shape)}"
        assert out.dtype == dtype, f"{dtype} gives {out.dtype}"
        assert out.isfinite().all(), f"{dtype}: not all numbers are finite"


@torch.no_grad()
def definition(subject: HookSubject) -> None:
    """It equals the masked dense computation."""
    heads = subject.heads()
    rows = subject.some(heads)
    assert_equal(subject.run(heads)[:, :, rows], subject.dense(heads, rows), "outputs", subject.tolerance)


def gradients(subject: HookSubject) -> None:
    """Gradients of queries, keys and values are those of the masked dense computation."""
    heads = Heads(*(one.requires_grad_() for one in subject.heads()))
    rows = subject.some(heads)
    outs = subject.run(heads)[:, :, rows], subject.dense(heads, rows)
    cotangent = torch.randn_like(outs[1])
    found, expected = (torch.autograd.grad(out, heads, cotangent) for out in outs)
    for name, one, other in zip(Heads._fields, found, expected, strict=True):
        assert_equal(one, other, f"gradients of {name}", subject.tolerance)


PROPERTIES = (
    Property("runs", runs),
    Property("definition", definition),
    Property("gradients", gradients),
)
