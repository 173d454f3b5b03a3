"""Applications whose attention is plain but for who sees whom: objects, frames, time steps, two streams, padding.

Sizes that papers do not give, or that were not found, are ours; each docstring says what the tokens are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook
from foveate.patterns import Grid, block_mask, boolean_mask, same_bucket


@hook("saits", papers=("SAITS",), tiny={"steps": 13, "batch": 2}, uses=("series",))
def saits(steps: int = 48, batch: int = 1) -> Hook:
    """SAITS: every time step of a multivariate series sees all others, and not itself; a lone step sees nothing.

    Du, Côté, Liu, SAITS: Self-Attention-based Imputation for Time Series, arXiv 2202.08516.
    """
    return Hook("~blocks(1)", heads=4, head_dim=64, length=steps, batch=batch)


@hook("through_the_mask", papers=("Through-The-Mask",), tiny={"labels": torch.arange(60) % 7 % 3}, uses=("video",))
def through_the_mask(labels: Tensor | None = None) -> Hook:
    """Through-The-Mask's self-attention: tokens of a video see those of the same object, in all frames.

    ``labels`` (N,) are the objects of tokens, of 16 frames of 16 x 16 by default, in which one moves over a background.
    Yariv et al., Through-The-Mask: Mask-based Motion Trajectories for Image-to-Video Generation, arXiv 2501.03059.
    """
    if labels is None:
        frame, row, column = Grid(16, 16, 16).coordinates(torch.arange(4096))
        labels = ((row - frame).abs() < 4) & ((column - frame).abs() < 4)
    return Hook(same_bucket(labels.long().view(1, 1, -1)), heads=8, head_dim=64, length=len(labels))


@hook(
    "through_the_mask_prompts",
    papers=("Through-The-Mask",),
    tiny={"labels": torch.arange(60) % 7 % 3, "words": torch.tensor([0, 0, 1, 2, 2, 1, 0])},
    uses=("video",),
)
def through_the_mask_prompts(labels: Tensor | None = None, words: Tensor | None = None) -> Hook:
    """Through-The-Mask's cross-attention: tokens of an object see the words of its own prompt.

    ``labels`` (N,) are the objects of tokens, ``words`` (M,) those of words: by default 4,096 tokens and two prompts of
    32 words.
    """
    labels = torch.arange(4096) % 96 // 64 if labels is None else labels
    words = torch.arange(64) // 32 if words is None else words
    pattern = same_bucket(labels.long().view(1, 1, -1), words.long().view(1, 1, -1))
    return Hook(pattern, heads=8, head_dim=64, length=len(words), queries=len(labels))


@hook("poster_v2", papers=("POSTER++",), tiny={"height": 8, "width": 6, "window": 2, "batch": 2}, uses=("image",))
def poster_v2(height: int = 28, width: int = 28, window: int = 28, batch: int = 1) -> Hook:
    """POSTER++: landmark features ask image features, both on one grid, inside windows.

    The paper's three scales are 28, 14 and 7 tokens a side, with as many heads as 2, 4 and 8 give; windows here may be
    smaller than the map. Mao et al., POSTER++: A simpler and stronger facial expression recognition network,
    arXiv 2301.12149.
    """
    return Hook(f"window_partition({window})", heads=2, head_dim=32, layout=Grid(height, width), batch=batch)


@hook("mocha_speech", papers=("MoCha",), tiny={"frames": 4, "tokens": 3, "speech": 13, "reach": 2}, uses=("video",))
def mocha_speech(frames: int = 32, tokens: int = 240, speech: int = 128, reach: int = 4) -> Hook:
    """MoCha: the tokens of a video frame see the speech tokens around the same moment, ``reach`` to either side.

    A frame t of T covers speech tokens from floor(t S / T) to ceil((t + 1) S / T), S being their number.
    Wei et al., MoCha: Towards Movie-Grade Talking Character Synthesis, arXiv 2503.23307.
    """
    frame, at = torch.arange(frames).unsqueeze(1), torch.arange(speech)
    first, end = frame * speech // frames - reach, -(-(frame + 1) * speech // frames) + reach
    pattern = block_mask((at >= first) & (at < end), 1, q_block=tokens)
    return Hook(pattern, heads=16, head_dim=64, length=speech, queries=frames * tokens)


@hook("lovecon", papers=("LOVECon",), tiny={"frames": 7, "tokens": 3, "window": 3}, uses=("video",))
def lovecon(frames: int = 32, tokens: int = 256, window: int = 8) -> Hook:
    """LOVECon's cross-window attention: a frame sees its own window, and both ends of the window before.

    Which frames of other windows are taken is from summaries of the paper. Liao, Deng, LOVECon: Text-driven
    Training-Free Long Video Editing with ControlNet, arXiv 2310.09711.
    """
    frame = torch.arange(frames)
    own = frame // window
    ends = (frame % window == 0) | (frame % window == window - 1)
    table = (own.unsqueeze(1) == own) | ((own.unsqueeze(1) - 1 == own) & ends)
    return Hook(block_mask(table, tokens), heads=8, head_dim=40, length=frames * tokens)


@hook("videobooth", papers=("VideoBooth",), tiny={"frames": 4, "tokens": 3, "prompt": 5}, uses=("video",))
def videobooth(frames: int = 16, tokens: int = 256, prompt: int = 256) -> Hook:
    """VideoBooth's cross-frame attention: a frame sees the first, the one before it, and an image prompt's tokens.

    Keys and values of the prompt's ``prompt`` tokens stand before those of the frames; queries are the frames' alone.
    The frame before the first is the first itself. Jiang et al., VideoBooth: Diffusion-based Video Generation with
    Image Prompts, arXiv 2312.00777.
    """
    frame = torch.arange(frames)
    seen = (frame == 0) | (frame == (frame - 1).clamp_min(0).unsqueeze(1))
    appended = torch.ones(frames, prompt, dtype=torch.bool)
    pattern = block_mask(torch.cat([appended, seen.repeat_interleave(tokens, 1)], 1), 1, q_block=tokens)
    return Hook(pattern, heads=8, head_dim=40, length=prompt + frames * tokens, queries=frames * tokens)


@hook("motion_i2v", papers=("Motion-I2V",), tiny={"frames": 5, "pixels": 4}, uses=("video",))
def motion_i2v(frames: int = 16, pixels: int = 1024) -> Hook:
    """Motion-I2V's temporal attention: each pixel sees itself in all frames, and the reference's features warped there.

    Warped features, one for each frame, are keys and values before those of the frames; queries are the frames'.
    Shi et al., Motion-I2V: Consistent and Controllable Image-to-Video Generation with Explicit Motion Modeling,
    arXiv 2401.15977.
    """
    return Hook("full", heads=8, head_dim=40, length=2 * frames, queries=frames, batch=pixels)


@hook("avis", papers=("AVIS",), tiny={"frames": 7, "objects": 3, "sounds": 2, "window": 3}, uses=("video",))
def avis(frames: int = 60, objects: int = 20, sounds: int = 1, window: int = 6, shifted: bool = True) -> Hook:
    """AVIS: objects see objects and sounds of their window of frames, every other layer shifted by half.

    A frame's keys are its objects, then its sounds; queries are the objects alone.
    Guo et al., Audio-Visual Instance Segmentation, arXiv 2310.18709.
    """
    number = (torch.arange(frames) + (window - window // 2 if shifted else 0)) // window
    table = (number.unsqueeze(1) == number).repeat_interleave(objects + sounds, 1)
    pattern = block_mask(table, 1, q_block=objects)
    return Hook(pattern, heads=8, head_dim=32, length=frames * (objects + sounds), queries=frames * objects)


def _padded(queries: int, real: Tensor) -> Hook:
    """Cross-attention to the tokens that are real, (B, M)."""
    seen = real[:, None, None].expand(-1, -1, queries, -1)
    return Hook(boolean_mask(seen), heads=8, head_dim=64, length=real.shape[1], queries=queries, batch=len(real))


@hook("gano", papers=("GANO",), tiny={"objects": 4, "lengths": [11, 3, 7]}, uses=("video",))
def gano(objects: int = 20, lengths: list[int] | None = None) -> Hook:
    """GANO's guided attention: objects ask the tokens of clips, of which each has a length of its own.

    Thakur et al., Enhancing Next Active Object-based Egocentric Action Anticipation with Guided Attention,
    arXiv 2305.12953.
    """
    each = torch.tensor(lengths or [1568, 784])
    return _padded(objects, torch.arange(int(each.max())) < each.unsqueeze(1))


@hook("guided_attention_sta", papers=("Guided Attention (EGO4D STA)",), tiny={"tokens": 9, "counts": [4, 0, 2]})
def guided_attention_sta(tokens: int = 1568, counts: list[int] | None = None) -> Hook:
    """Guided attention of StillFast's fast branch: tokens of clips ask detected objects, of which some have none.

    Thakur et al., Guided Attention for Next Active Object @ EGO4D STA Challenge, arXiv 2305.16066.
    """
    each = torch.tensor(counts or [12, 20])
    return _padded(tokens, torch.arange(int(each.max())) < each.unsqueeze(1))


@hook("dualfreq_rswa", papers=("DualFreq-RSWA",), tiny={"height": 9, "width": 7, "window": 3}, uses=("image",))
def dualfreq_rswa(height: int = 56, width: int = 56, window: int = 7) -> Hook:
    """The local branch of a detector of generated images: each place sees a window that slides with it.

    Dual Frequency Branch Framework with Reconstructed Sliding Windows Attention, arXiv 2501.15253. As a layer with
    projections it is the mixer ``neighborhood_attention``; sizes are ours.
    """
    return Hook(f"neighborhood({window})", heads=4, head_dim=32, layout=Grid(height, width))
