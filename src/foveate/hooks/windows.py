"""Applications whose attention is that of windows: images, spectrograms and videos cut into boxes, shifted or not."""

from __future__ import annotations

import math

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook
from foveate.patterns import Grid

AT_720P = (45, 80)  # height and width of the grid of tokens for which SeedVR2's windows were chosen
WINDOWS = (4, 3, 3)  # of 30 frames of that grid, along time, height and width


def seedvr2_window(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The size of SeedVR2's windows on a grid: that of 720p scaled to the grid's shape, so that few borders are left.

    >>> seedvr2_window(30, 45, 80), seedvr2_window(30, 90, 160), seedvr2_window(5, 64, 64)
    ((8, 15, 27), (8, 15, 27), (2, 20, 20))
    """
    scale = math.sqrt(AT_720P[0] * AT_720P[1] / (height * width))
    sides = (min(frames, 30), round(height * scale), round(width * scale))
    time, high, wide = (-(-side // count) for side, count in zip(sides, WINDOWS, strict=True))
    return time, high, wide


@hook("seedvr2", papers=("SeedVR2",), tiny={"frames": 3, "height": 7, "width": 9}, uses=("video",))
def seedvr2(frames: int = 30, height: int = 45, width: int = 80, shifted: bool = False) -> Hook:
    """SeedVR2's attention: 3D windows whose size follows from the grid at run time; every other layer shifts by half,
    along the axes that have more than one.

    Windows at the borders hold what is left. Heads are those of a width of 2,560 with 20 heads (the 3B model), as far
    as was found; text tokens are left out. Wang et al., SeedVR2: One-Step Video Restoration via Diffusion Adversarial
    Post-Training, arXiv 2506.05301.
    """
    size = seedvr2_window(frames, height, width)
    sides = (frames, height, width)
    shift = tuple(side // 2 if shifted and side < length else 0 for side, length in zip(size, sides, strict=True))
    return Hook(f"window_partition({size}, shift={shift})", heads=20, head_dim=128, layout=Grid(frames, height, width))


@hook("audio_mae_decoder", papers=("Audio-MAE",), tiny={"time": 10, "frequency": 6, "batch": 2}, uses=("series",))
def audio_mae_decoder(time: int = 64, frequency: int = 8, shifted: bool = True, batch: int = 1) -> Hook:
    """Audio-MAE's decoder: windows of 4 x 4 patches of a spectrogram, every other layer shifted by 2 along time alone.

    A spectrogram of 1,024 frames and 128 bands has 64 x 8 patches of 16 x 16. Huang et al., Masked Autoencoders that
    Listen, arXiv 2207.06405.
    """
    shift = (2, 0) if shifted else (0, 0)
    layout = Grid(time, frequency)
    return Hook(f"window_partition((4, 4), shift={shift})", heads=16, head_dim=32, layout=layout, batch=batch)


@hook("hbformer", papers=("HBFormer",), tiny={"height": 9, "width": 8}, uses=("image",))
def hbformer(height: int = 56, width: int = 56, window: int = 7, shifted: bool = True) -> Hook:
    """HBFormer's attention is Swin's: windows of 7 x 7 tokens, every other layer shifted by 3.

    Sizes are those of Swin-T's first stage at 224 pixels. HBFormer: A Hybrid-Bridge Transformer for Microtumor and
    Miniature Organ Segmentation, arXiv 2512.03597.
    """
    shift = window // 2 if shifted else 0
    return Hook(f"window_partition({window}, shift={shift})", heads=3, head_dim=32, layout=Grid(height, width))
