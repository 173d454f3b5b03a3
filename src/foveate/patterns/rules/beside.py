"""A grid with other tokens beside it: class and register tokens before, text behind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.layouts.kinds import Grid, Layout, pad_slots
from foveate.patterns.rules.sequence import is_count


@dataclass(frozen=True)
class Beside(Layout):
    """``before`` tokens, then those of a grid, then ``after`` tokens: class or register tokens, text.

    A pattern on a grid holds among the tokens of the grid. A pair with one of the others is visible to it, so
    these see all and are seen by all, unless the rest of the pattern hides them (``neighborhood(7) & causal``).
    With ``others=False`` it is hidden from it, to be shown by what is joined: ``sta(8, 3) | global_tokens([0])``.
    What lies inside ``~`` makes no difference to that. Patterns of positions count all tokens.

    >>> from foveate import Grid, sta
    >>> Beside(Grid(4, 4), before=1, after=3).length
    20
    >>> sta(1, 2).mask(5, layout=Beside(Grid(3), before=1, after=1))[0, 0].int()
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 1, 0, 1],
            [1, 1, 1, 0, 1],
            [1, 0, 1, 1, 1],
            [1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    grid: Grid
    before: int = 0
    after: int = 0
    others: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid):
            raise TypeError(f"Beside takes a Grid and how many tokens lie before and after it; got {self.grid!r}")
        if not (is_count(self.before) and is_count(self.after)):
            raise ValueError(f"Beside takes whole numbers of tokens >= 0; got {self.before!r} and {self.after!r}")

    @property
    def length(self) -> int:
        return self.end + self.after

    @property
    def end(self) -> int:
        """Position of the first token behind the grid."""
        return self.before + self.grid.length

    @property
    def num_axes(self) -> int:
        return self.grid.num_axes

    def holds(self, positions: Tensor) -> Tensor:
        """Whether each position is one of the grid's."""
        return (positions >= self.before) & (positions < self.end)

    def coordinates(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Those of the grid's first or last token for the tokens before or behind it."""
        return self.grid.coordinates((positions - self.before).clamp(0, self.grid.length - 1))

    def slots(self, tile: int, device: torch.device | str = "cpu") -> Tensor | None:
        """The others in tiles of their own."""
        before, after = torch.arange(self.before, device=device), torch.arange(self.end, self.length, device=device)
        among = self.grid.slots(tile, device)
        assert among is not None
        among = torch.where(among < 0, -1, among + self.before)
        return torch.cat([pad_slots(before, tile), pad_slots(among, tile), pad_slots(after, tile)])

    def inverted(self) -> Beside:
        return replace(self, others=not self.others)

    def __str__(self) -> str:
        settings = [str(self.grid)]
        for name, default in (("before", 0), ("after", 0), ("others", True)):
            if getattr(self, name) != default:
                settings.append(f"{name}={getattr(self, name)}")
        return f"Beside({', '.join(settings)})"
