"""Right or wrong: against the definition in float64, allowed twice the error of a plain computation.

The error of one plain computation is a random number, in a small case often 0 by luck. So whatever exceeds the bound
is judged again by what rounding does to the definition itself: its spread when every input moves by a unit of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRIES = 64  # of moved inputs, before a disagreement is believed
ULPS = 4.0  # of the sizes that were summed
FLUSHED = 2.0**18  # summed terms below the least normal number, which kernels may take for 0
DOUBLE_ULPS = 2.0**14  # the same in float64, where nothing is wider: what logits and sums of rows lose stays lost

Definition = Callable[..., Sequence[Tensor]]  # tensors in, tensors out, computed in the dtype of the tensors


class Disagreement(AssertionError):
    """The implementation is wrong, or breaks a promise."""


@dataclass
class Judge:
    """Compares results with ``definition(*inputs)``.

    ``low`` is the dtype of the plain computation. ``sizes`` gives results without cancellation, from the same inputs
    and in the same order, whose rounding is always allowed; by default the results themselves. What comes out is
    besides allowed one rounding to its own dtype. ``other`` is the definition computed in another order of sums.
    """

    definition: Definition
    inputs: Sequence[Tensor]
    low: torch.dtype
    sizes: Definition | None = None
    other: Definition | None = None
    ulps: float = ULPS
    spoiled: Tensor | None = None  # rows that see what is not finite: all of them may be NaN

    def __call__(self, names: Sequence[str], actual: Sequence[Tensor]) -> None:
        wide = [x.detach().double() for x in self.inputs]
        truths = self.definition(*wide)
        plains = (
            truths if self.low == torch.float64 else self.definition(*(x.detach().to(self.low) for x in self.inputs))
        )
        for number, (name, mine) in enumerate(zip(names, actual, strict=True)):
            self.compare(number, name, mine.detach(), plains[number].detach().double(), truths[number].detach())

    def compare(self, number: int, name: str, mine: Tensor, plain: Tensor, truth: Tensor) -> None:
        if mine.shape != truth.shape:
            raise Disagreement(f"{name} has shape {tuple(mine.shape)}, not {tuple(truth.shape)}")
        if not mine.numel():
            return
        stored, least = roundings(mine.dtype) if mine.dtype != self.low else (0.0, 0.0)
        mine = mine.double()
        finite = same_finite(name, mine, plain, truth, self.spoiled)
        off, by_plain, of = (norm(x, finite) for x in (mine - truth, plain - truth, truth))
        floor = stored * of + (least + FLUSHED * torch.finfo(self.low).tiny) * truth.numel()
        if off <= 2 * by_plain + floor:
            return
        if self.sizes is not None:
            of = norm(self.sizes(*(x.detach().double() for x in self.inputs))[number].detach(), finite)
        ulps = DOUBLE_ULPS if self.low == torch.float64 else self.ulps
        floor += (stored + ulps * torch.finfo(self.low).eps) * of
        if off <= 2 * by_plain + floor:
            return
        spread = max(self.spread(number, truth, finite), self.by_other(number, truth, finite))
        if not off <= 2 * max(by_plain, spread) + floor:
            raise Disagreement(
                f"{name} is off by {off:.3g} of {of:.3g} (a plain {str(self.low).removeprefix('torch.')} computation "
                f"by {by_plain:.3g}, rounded inputs by {spread:.3g}); {worst(mine, truth, finite)}"
            )

    def by_other(self, number: int, truth: Tensor, finite: Tensor) -> float:
        if self.other is None:
            return 0.0
        result = self.other(*(x.detach().to(self.low) for x in self.inputs))[number].detach().double()
        return norm(result - truth, finite & result.isfinite())

    def spread(self, number: int, truth: Tensor, finite: Tensor) -> float:
        """How far the result goes when inputs move by a unit of rounding, computed exactly and plainly."""
        generator, eps, far = torch.Generator().manual_seed(0), torch.finfo(self.low).eps, 0.0
        for attempt in range(TRIES):
            pushes = (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1 for x in self.inputs)
            shifted = [x.detach().double() * (1 + eps * push) for x, push in zip(self.inputs, pushes, strict=True)]
            dtype = torch.float64 if attempt % 2 else self.low
            result = self.definition(*(x.to(dtype) for x in shifted))[number].detach().double()
            far = max(far, norm(result - truth, finite & result.isfinite()))
        return far


def roundings(dtype: torch.dtype) -> tuple[float, float]:
    """What storing a number may change: relative, and of numbers near 0."""
    kind = torch.finfo(dtype)
    return kind.eps, kind.tiny * kind.eps


def same_finite(name: str, mine: Tensor, plain: Tensor, truth: Tensor, spoiled: Tensor | None = None) -> Tensor:
    """Where all are finite; refuses what is finite in one where the definition, however computed, is not."""
    fine, plain_fine, true_fine = mine.isfinite(), plain.isfinite(), truth.isfinite()
    wrong = (plain_fine == true_fine) & (fine != true_fine)
    if spoiled is not None:
        rows = spoiled if spoiled.dim() == truth.dim() else spoiled.unsqueeze(-1)
        wrong &= fine | ~rows
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise Disagreement(
            f"{name} at {place} (and {int(wrong.sum())} places in all) is {float(mine[place]):.6g}, "
            f"not {float(truth[place]):.6g}"
        )
    return fine & plain_fine & true_fine


def norm(x: Tensor, finite: Tensor) -> float:
    return float(torch.where(finite, x, 0).norm())


def worst(mine: Tensor, truth: Tensor, finite: Tensor) -> str:
    entry = torch.where(finite, (mine - truth).abs(), 0).argmax()
    place = tuple(int(i) for i in torch.unravel_index(entry, truth.shape))
    return f"worst at {place}: {float(mine[place]):.6g}, not {float(truth[place]):.6g}"


def same(name: str, mine: Tensor, other: Tensor) -> None:
    """Number for number."""
    if mine.shape != other.shape or mine.dtype != other.dtype:
        raise Disagreement(f"{name}: {mine.dtype} {tuple(mine.shape)}, not {other.dtype} {tuple(other.shape)}")
    if not torch.equal(mine, other):
        wrong = (mine != other).nonzero()
        raise Disagreement(f"{name} differs in {len(wrong)} places, first at {tuple(wrong[0].tolist())}")


def demand(condition: bool, message: str) -> None:
    if not condition:
        raise Disagreement(message)
