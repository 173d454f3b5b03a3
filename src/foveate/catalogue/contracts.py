"""What the functions of the tiers return: methods, recipes and their stages, hooks, findings, pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.layouts import Layout
    from foveate.patterns import Pattern


class Undoable(Protocol):
    """Something done to a model (`foveate.adapt.swap.Change`)."""

    def undo(self) -> None:
        """Give the model back what it had."""


class Method(Protocol):
    """A way to run a pretrained model that needs no training."""

    def install(self, model: nn.Module) -> Undoable:
        """Let the model run so from now on, its parameters as they are."""


@dataclass(frozen=True)
class Stage:
    """One stage of training: which parameters learn, by name, and from what.

    ``loss`` takes the student, its teacher (the model the recipe began with) and a batch; ``steps`` and ``lr`` are the
    recipe's own, from which a user may depart.
    """

    name: str
    trains: Callable[[str], bool]
    loss: Callable[[nn.Module, nn.Module, Any], Tensor]
    steps: int = 1000
    lr: float = 1e-3


class Recipe(Protocol):
    """What makes another model of a pretrained one, and trains it."""

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages, in order."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The student, with the weights that it inherits; the model itself stays as it is."""


@dataclass(frozen=True)
class Hook:
    """An application's attention: the operator and its options, and the shapes it is called with.

    ``operator`` is a training-free mechanism of the catalogue, or a pattern, written out or as it is; ``options`` are
    the mechanism's. ``layout`` says where the keys live, or ``length`` how many there are in a row; ``queries`` is
    their number where they are not the keys' own tokens. ``bias`` is added to the logits, (B or 1, H or 1, N, M).
    """

    operator: str | Pattern
    heads: int
    head_dim: int
    options: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    layout: Layout | None = None
    batch: int = 1
    kv_heads: int | None = None
    queries: int | None = None
    causal: bool = False
    bias: Tensor | None = None

    @property
    def keys(self) -> int:
        """Number of keys; ValueError where neither a length nor a layout says it."""
        length = self.length if self.layout is None else self.layout.length
        if length is None:
            raise ValueError(f"a hook says how many keys there are: pass length or layout; got {self}")
        return length


@dataclass(frozen=True)
class Finding:
    """What a probe found: the claim that it tried, whether it holds here, figures, and a picture (SVG).

    >>> Finding("weights of far keys vanish", True, {"share": 0.01}, "<svg/>").verdict
    'confirmed'
    """

    claim: str
    confirmed: bool
    figures: Mapping[str, float]
    picture: str

    @property
    def verdict(self) -> str:
        return "confirmed" if self.confirmed else "refuted"


@dataclass(frozen=True)
class Page:
    """A page of the documentation, from the root of the repository, and the names of the rows that it tells of."""

    path: str
    covers: tuple[str, ...]
