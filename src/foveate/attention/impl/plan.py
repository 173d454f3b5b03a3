"""What kernels run: a call planned once, without its tensors, so that forward and backward run the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from foveate.attention.bias import Bias
from foveate.attention.call import Call
from foveate.attention.dropout import Dropout
from foveate.attention.impl.neighborhood import Windows
from foveate.attention.normalise import Normalise
from foveate.attention.score import ScoreFunction
from foveate.attention.weights import Kind
from foveate.layouts.kinds import Layout
from foveate.layouts.place import Slots
from foveate.patterns.algebra import Pattern
from foveate.patterns.band import UNBOUNDED, Band
from foveate.patterns.select.selection import FULL, Selection

WIDEST = 256  # channels of a head in the native kernels


@dataclass(frozen=True, eq=False)
class Piece:
    """One document of a call: its batch entries, its queries and keys, and what was selected of it."""

    batch: slice
    queries: Slots
    keys: Slots
    selected: Selected

    def part(self, x: Tensor, at: Slots) -> Tensor:
        """Of (B, H, N, ...) the tokens of this document."""
        return x[self.batch, :, at]


@dataclass(frozen=True, eq=False)
class ByDocument:
    """What the kernels run one after the other; every token is in one piece at most."""

    pieces: tuple[Piece, ...]


Selected = Selection | Band | Windows | ByDocument


class Plan(NamedTuple):
    """All of a call but its tensors, the pattern as what was selected."""

    selected: Selected
    biases: tuple[Bias, ...]
    kind: Kind
    scale: float
    softcap: float | None
    dropout: Dropout | None = None

    @property
    def functions(self) -> tuple[ScoreFunction, ...]:
        """None: kernels take no functions of logits, which the definition asks for."""
        return ()

    @property
    def normalise(self) -> Normalise | None:
        """None likewise."""
        return None


class Kernels(Protocol):
    """A module that attends over what was selected, forward and backward."""

    def refuse(self, call: Call) -> str | None:
        """Why these kernels cannot run the call; None if they can."""

    def in_known_terms(self, call: Call) -> Call:
        """The call, with biases that these kernels do not know written as those they do."""

    def select(
        self,
        q: Tensor,
        k: Tensor,
        pattern: Pattern,
        layout: Layout,
        scale: float,
        *,
        plain: bool,
        biases: tuple[Bias, ...] = (),
    ) -> Selected:
        """The pattern in the form these kernels run; plain calls are softmax without soft-cap."""

    def forward(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Heads out (B, H, N, Dv) and log row sums (B, H, N) of ``sums_dtype(q)``, zeros for unnormalised weights."""

    def backward(
        self,
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


def facts(selected: Selected) -> dict[str, Any]:
    """What of the pairs is computed, in which form; sizes are counts, and bytes those of the lists."""
    if isinstance(selected, ByDocument):
        return {"documents": len(selected.pieces)} | _sums([facts(piece.selected) for piece in selected.pieces])
    if isinstance(selected, Band):
        ends = (str(end) if abs(end) < UNBOUNDED else "any" for end in selected)
        return {"distances": " to ".join(ends)}
    if isinstance(selected, Windows):
        return {"windows": "x".join(map(str, selected.size)), "grid": "x".join(map(str, selected.dims))}
    values = (getattr(selected, field.name) for field in fields(selected))
    lists = [x for x in values if isinstance(x, Tensor)]
    gathered = {} if selected.runs is None else {"gathered_runs": len(selected.runs)}
    return {
        "tiles": selected.num_tiles,
        "masked": int((selected.mask_ids != FULL).sum()),
        "columns": selected.num_columns,
        **gathered,
        "computed": f"{selected.computed:.1%}",
        "list_bytes": sum(x.numel() * x.element_size() for x in lists),
    }


def _sums(pieces: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts of all documents together."""
    names = dict.fromkeys(name for piece in pieces for name, value in piece.items() if isinstance(value, int))
    return {name: sum(piece.get(name, 0) for piece in pieces) for name in names}
