"""Methods for the attention of video diffusion models, as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from foveate.catalogue.tiers import method
from foveate.methods.core import CoreMethod
from foveate.methods.denoising import SteppedMethod
from foveate.mixers.dynamic_sparse.adaspa import AdaSpa
from foveate.mixers.dynamic_sparse.denoising import Clock, SteppedCore
from foveate.mixers.dynamic_sparse.jenga import Jenga
from foveate.mixers.dynamic_sparse.sparse_videogen import SparseVideoGen
from foveate.mixers.dynamic_sparse.svg2 import SVG2

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
    tiny={"grid": (15, 3, 1), "block": 4, "mass": 0.3, "least": 0.1},
    full_budget={"mass": 1.0},
    uses=("video",),
)
def jenga(
    grid: tuple[int, int, int],
    *,
    text: int = 0,
    block: int = 128,
    mass: float = 0.3,
    least: float = 0.25,
    area: float = 1.0,
    amplitude: float = 1.0,
    layers: Layers | None = None,
    heads: Iterable[int] | None = None,
) -> CoreMethod:
    """Jenga's attention carving: blocks along a space-filling curve attend to likely, adjacent and text blocks.

    ``grid`` are the frames, rows and columns of the video's tokens, behind which there are ``text`` more. See
    `foveate.mixers.dynamic_sparse.jenga.Jenga`. The method's progressive resolution is the sampler's affair: install
    it anew with the ``grid`` and ``area`` of each of its stages. The authors' code keeps ``least`` at 0.25 to 0.3 of
    the blocks in its first stage, and 0.15 to 0.2 in the second.

    Zhang et al., Training-Free Efficient Video Generation via Dynamic Token Carving, arXiv 2505.16864.
    """
    return CoreMethod(Jenga(grid, text, block, mass, least, area, amplitude), layers, heads)


@method(
    "svg2",
    papers=("SVG2",),
    tiny={"grid": (5, 3, 3), "q_clusters": 5, "k_clusters": 9, "mass": 0.3, "least": 0.1, "dense_steps": 0},
    full_budget={"mass": 1.0},
    uses=("video",),
)
def svg2(
    grid: tuple[int, int, int],
    *,
    text: int = 0,
    q_clusters: int = 400,
    k_clusters: int = 1000,
    mass: float = 0.9,
    least: float = 0.1,
    first_iterations: int = 50,
    iterations: int = 2,
    dense_steps: int = 5,
    steps: int = 50,
    passes: int = 1,
    seed: int = 0,
    layers: Layers | None = None,
    heads: Iterable[int] | None = None,
) -> SteppedMethod:
    """Sparse VideoGen2: tokens permuted into clusters of like queries and keys, pairs of clusters by their centroids.

    ``grid`` are the frames, rows and columns of the video's tokens, behind which there are ``text`` more. See
    `foveate.mixers.dynamic_sparse.svg2.SVG2`, and `foveate.methods.denoising.SteppedMethod` for ``steps`` and
    ``passes``. The defaults are those of the authors' script for HunyuanVideo at 720p, which leaves the first layers as
    they are too (name the other ``layers``), and measures its first tenth of steps by noise, not by number. It draws
    the first centroids with replacement, for each head anew; here they are distinct, the same places for all.

    Yang et al., Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation,
    arXiv 2505.18875.
    """

    def make(clock: Clock, _: int) -> SteppedCore:
        sizes = (q_clusters, k_clusters, mass, least, first_iterations, iterations, dense_steps, seed)
        return SVG2(grid, text, *sizes, clock=clock)

    return SteppedMethod(make, steps, passes, layers, heads)


@method(
    "adaspa",
    papers=("AdaSpa",),
    tiny={"grid": (5, 3, 3), "sparsity": 0.6, "block": 4, "searches": (1,)},
    full_budget={"sparsity": 0.0},
    uses=("video",),
)
def adaspa(
    grid: tuple[int, int, int],
    *,
    text: int = 0,
    sparsity: float = 0.8,
    block: int = 64,
    searches: tuple[int, ...] = (10, 30),
    adaptive: bool = True,
    steps: int = 50,
    passes: int = 1,
    layers: Layers | None = None,
    heads: Iterable[int] | None = None,
) -> SteppedMethod:
    """AdaSpa: blocks chosen by the exact weights that they hold at a step of denoising, and seen at those after it.

    ``grid`` are the frames, rows and columns of the video's tokens, behind which there are ``text`` more. See
    `foveate.mixers.dynamic_sparse.adaspa.AdaSpa`, and `foveate.methods.denoising.SteppedMethod` for ``steps`` and
    ``passes``. Up to the first of ``searches`` everything is seen.

    Xia et al., Training-free and Adaptive Sparse Attention for Efficient Long Video Generation, arXiv 2502.21079.
    """

    def make(clock: Clock, _: int) -> SteppedCore:
        return AdaSpa(grid, text, sparsity, block, searches, adaptive, clock=clock)

    return SteppedMethod(make, steps, passes, layers, heads)
