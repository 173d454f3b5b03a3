"""Static patterns on points in space."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.layouts.kinds import Points
from foveate.patterns.algebra import Bounds, Boxes, Index, Pattern, Scene
from foveate.patterns.rules.grid import require_layout


@dataclass(frozen=True, eq=False, repr=False)
class Within(Pattern):
    """Keys at most `radius` away; `points` is None until the pattern is resolved."""

    radius: float
    points: Points | None = None
    needs_axes = True

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"within({self.radius})"

    @property
    def batches(self) -> int:  # type: ignore[override]
        return 1 if self.points is None else self.points.batches

    def resolve(self, scene: Scene) -> Pattern:
        require_layout(self, scene, Points, "Points(coords)")
        assert isinstance(scene.layout, Points)
        return dataclasses.replace(self, points=scene.layout)

    def visible(self, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        if self.points is None:
            raise ValueError(f"{self} lives on points: pass layout=Points(coords) and resolve it first")
        axes = zip(self.points.place_of(batch, q), self.points.place_of(batch, k), strict=True)
        return self.reaches([at_q - at_k for at_q, at_k in axes])

    def bounds(self, boxes: Boxes) -> Bounds:
        """By the least and greatest distance of bounding boxes; sound, as rounding keeps order."""
        if not boxes.axes:  # clouds that differ by batch entry, which no order of tokens suits all of
            return super().bounds(boxes)
        gaps, spans = [], []
        for at in boxes.axes:
            nearest, farthest = at.q_lo - at.k_hi, at.q_hi - at.k_lo
            gaps.append(torch.maximum(nearest, -farthest).clamp_min(0))
            spans.append(torch.maximum(-nearest, farthest))
        return Bounds(some=self.reaches(gaps), every=self.reaches(spans))

    def reaches(self, differences: list[Tensor]) -> Tensor:
        """Whether a vector of these differences along the axes is at most `radius` long."""
        square = differences[0] * differences[0]
        for difference in differences[1:]:
            square = square + difference * difference
        return square <= self.radius * self.radius


def within(radius: float) -> Pattern:
    """Keys at a Euclidean distance of at most ``radius``, on a ``Points`` layout.

    >>> from foveate import Points
    >>> line = Points(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]))
    >>> within(1.5).mask(3, layout=line)[0, 0].int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)

    Raises ValueError for a radius that is not a finite number above 0.
    """
    is_number = isinstance(radius, (int, float)) and not isinstance(radius, bool)
    if not (is_number and math.isfinite(radius) and radius > 0):
        raise ValueError(f"within takes a finite radius above 0; got {radius!r}")
    return Within(float(radius))
