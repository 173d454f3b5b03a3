"""mamba_ssm's and causal_conv1d's functions by their names and arguments, over `recur` and `scan`, on any device.

>>> import torch
>>> from foveate.compat.mamba import selective_scan_fn  # in place of mamba_ssm.ops.selective_scan_interface's
>>> u, A, B = torch.randn(1, 8, 100), -torch.rand(8, 4), torch.randn(1, 4, 100)
>>> selective_scan_fn(u, u, A, B, B, delta_softplus=True).shape
torch.Size([1, 8, 100])
"""

from foveate.compat.mamba.blocks import mamba_inner_fn, mamba_split_conv1d_scan_combined
from foveate.compat.mamba.conv import causal_conv1d_fn, causal_conv1d_update
from foveate.compat.mamba.norm import LayerNorm, RMSNorm, RMSNormGated, layernorm_fn, rmsnorm_fn
from foveate.compat.mamba.selective import selective_scan_fn, selective_state_update
from foveate.compat.mamba.ssd import mamba_chunk_scan_combined

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
