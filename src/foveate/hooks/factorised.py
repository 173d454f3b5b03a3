"""Applications to video whose attention is factorised: over the tokens of a frame, and over frames at a token's place.

Tokens (B, T, N, C) lie as a batch of B T frames for the one and of B N places for the other: a hook for each, which
`foveate.models.blocks.factorised.Factorised` joins.
"""

from __future__ import annotations

from typing import Any

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook

TINY = {"frames": 5, "batch": 2}


@hook("dsta_space", papers=("DSTA",), tiny=TINY)
def dsta_space(frames: int = 3, batch: int = 1) -> Hook:
    """DSTA in a frame: the three joints of a limb see one another and the body's centre, which comes last of 16 tokens.

    8 heads of 4 channels, as in the authors' code; what the centre sees itself is not used there. They run it on the
    frame in the middle alone (``frames=1``).

    He, Yang, Video-Based Human Pose Regression via Decoupled Space-Time Aggregation, arXiv 2403.19926.
    """
    return Hook("blocks(3) | global_tokens([15])", heads=8, head_dim=4, length=16, batch=batch * frames)


@hook("dsta_time", papers=("DSTA",), tiny=TINY)
def dsta_time(frames: int = 3, batch: int = 1) -> Hook:
    """DSTA through time: each of 16 joints sees itself in all frames."""
    return Hook("full", heads=8, head_dim=4, length=frames, batch=batch * 16)


@hook("g2v2former_space", papers=("G2V2former",), tiny=TINY | {"patches": 11})
def g2v2former_space(frames: int = 8, patches: int = 196, batch: int = 1) -> Hook:
    """G2V2former in a frame: every patch sees every other; heads and patches are those of ViT-B at 224 pixels here.

    Yang et al., G2V2former: Graph Guided Video Vision Transformer for Face Anti-Spoofing, arXiv 2408.07675.
    """
    return Hook("full", heads=12, head_dim=64, length=patches, batch=batch * frames)


@hook("g2v2former_time", papers=("G2V2former",), tiny=TINY | {"patches": 11})
def g2v2former_time(
    frames: int = 8, patches: int = 196, batch: int = 1, operator: str = "full", **options: Any
) -> Hook:
    """G2V2former through time: each patch sees its place in other frames, by whatever operator is plugged in.

    ``operator`` is a training-free mechanism of the catalogue with its ``options``, or a pattern written out. The
    paper's own, Kronecker temporal attention, is not among them: its formula was not at hand.
    """
    return Hook(operator, heads=12, head_dim=64, options=options, length=frames, batch=batch * patches)
