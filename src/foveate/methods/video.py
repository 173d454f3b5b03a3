"""Methods for the attention of video diffusion models, as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from foveate.catalogue.tiers import method
from foveate.methods.core import CoreMethod
from foveate.mixers.dynamic_sparse.jenga import Jenga
from foveate.mixers.dynamic_sparse.sparse_videogen import SparseVideoGen

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@method(
    "sparse_videogen",
    papers=("SVG (Sparse VideoGen)",),
    tiny={"grid": (5, 3, 3), "keep": 0.3},
    full_budget={"keep": 1.0},
    uses=("video",),
)
def sparse_videogen(
    grid: tuple[int, int, int],
    *,
    text: int = 0,
    keep: float = 0.25,
    samples: int = 64,
    sink: bool = True,
    layers: Layers | None = None,
    heads: Iterable[int] | None = None,
) -> CoreMethod:
    """Sparse VideoGen: heads found spatial or temporal as they run, each attending to a band of its own order.

    ``grid`` are the frames, rows and columns of the video's tokens, behind which there are ``text`` more. See
    `foveate.mixers.dynamic_sparse.sparse_videogen.SparseVideoGen`. The authors' code leaves the first layers and the
    first steps of denoising as they are: name the other ``layers``, and undo it for those steps. It draws the sampled
    queries at random, where here they are evenly spread, and rounds bands to its kernel's blocks.

    Xi et al., Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity,
    arXiv 2502.01776.
    """
    return CoreMethod(SparseVideoGen(grid, text, keep, samples, sink), layers, heads)


@method(
    "jenga",
    papers=("Jenga",),
    tiny={"grid": (5, 3, 3), "block": 4, "mass": 0.3},
    full_budget={"mass": 1.0},
    uses=("video",),
)
def jenga(
    grid: tuple[int, int, int],
    *,
    text: int = 0,
    block: int = 128,
    mass: float = 0.3,
    layers: Layers | None = None,
    heads: Iterable[int] | None = None,
) -> CoreMethod:
    """Jenga's attention carving: blocks along a space-filling curve attend to likely, adjacent and text blocks.

    ``grid`` are the frames, rows and columns of the video's tokens, behind which there are ``text`` more. See
    `foveate.mixers.dynamic_sparse.jenga.Jenga`. The method's progressive resolution is the sampler's affair.

    Zhang et al., Training-Free Efficient Video Generation via Dynamic Token Carving, arXiv 2505.16864.
    """
    return CoreMethod(Jenga(grid, text, block, mass), layers, heads)
