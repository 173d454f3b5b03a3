"""Headings of the groups of cases, by benchmark."""

from __future__ import annotations

ATTEND = {
    "dense": "Dense, forward",
    "causal": "Causal, forward",
    "training": "Causal, forward + backward",
    "window": "Window of 256, forward",
    "window-training": "Window of 256, forward + backward",
    "neighborhood": "Neighborhoods on grids, forward",
    "blocks": "Random 64 x 64 blocks, forward",
    "swin": "Shifted Swin windows, forward",
    "swin-training": "Shifted Swin windows, forward + backward",
    "decode": "Decoding, 32 / 8 heads, D 128",
}
RECUR = {
    "delta": "Gated delta rule, forward",
    "delta-training": "Gated delta rule, forward + backward",
    "gated": "Gated attention, forward",
    "gated-training": "Gated attention, forward + backward",
    "scan": "Selective scan, 16 states a channel, forward",
    "scan-training": "Selective scan, 16 states a channel, forward + backward",
    "layers": "transformers layers, d 512, prefill",
    "layers-decode": "transformers layers, d 512, one cached step",
    "per-token": "The same work per token at any length, forward",
    "crossover": "Beside exact causal attention, forward",
}
