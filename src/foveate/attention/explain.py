"""What would run a call, and why nothing else would."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.attention.api import IMPLEMENTATIONS, choose
from foveate.attention.biases import BiasLike
from foveate.attention.call import prepare
from foveate.attention.weights import Weights
from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.rules.sequence import full


@dataclass(frozen=True)
class Explanation:
    """The implementation that ``impl="auto"`` picks, and each one's reason not to run (None: it could)."""

    chosen: str
    reasons: dict[str, str | None]
    pattern: str
    slow_because: str | None = None  # what makes the pattern itself slow

    def __str__(self) -> str:
        lines = [f"{self.pattern}: runs on {self.chosen}"]
        if self.slow_because is not None:
            lines.append(f"  slow: {self.slow_because}")
        for name, reason in self.reasons.items():
            verdict = "chosen" if name == self.chosen else "could run, stands later in the order"
            lines.append(f"  {name:<10} {verdict if reason is None else f'no: {reason}'}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = full,
    *,
    bias: BiasLike = None,
    weights: Weights | str = "softmax",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    dropout: float = 0.0,
    partial: bool = False,
) -> Explanation:
    """Which implementation :func:`attend` (with ``partial``: :func:`attend_partial`) would run, and why.

    >>> import torch
    >>> from foveate import explain, sigmoid
    >>> q = k = v = torch.randn(1, 2, 1024, 8, dtype=torch.float64)
    >>> print(explain(q, k, v, weights="sigmoid"))
    full: runs on tiles
      native     no: it has float32, bfloat16 and float16, not float64
      sdpa       no: it has softmax weights only, not sigmoid
      flex       no: FlexAttention has no backward on CPU, and compiles for seconds
      tiles      chosen
      reference  could run, stands later in the order
    """
    call, _ = prepare(
        q, k, v, pattern, bias, weights, scale, softcap, layout, needs_lse=partial, dropout=dropout, seed=0
    )
    reasons = {name: module.refuse(call) for name, module in IMPLEMENTATIONS.items()}
    chosen = choose(call)
    name = next(name for name, module in IMPLEMENTATIONS.items() if module is chosen)
    return Explanation(name, reasons, str(pattern), pattern.slow_because)
