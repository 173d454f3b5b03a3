"""mamba_ssm's gated norms: RMSNorm and LayerNorm with a SiLU gate before or after, over groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.compat.mamba.packing import check
from foveate.precision import to_accum


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm(x) * silu(z), or RMSNorm(x * silu(z)) with ``norm_before_gate=False``.

    >>> x, z = torch.randn(2, 10, 12), torch.randn(2, 10, 12)
    >>> rmsnorm_fn(x, torch.ones(12), None, z, group_size=4).shape
    torch.Size([2, 10, 12])

    x and z are (..., channels) of any floating dtype, weight and bias (channels,); each ``group_size`` channels, all
    by default, have a mean square of their own. Computed in float32, or float64 if x is that; out has x's dtype.
    Raises ValueError where shapes do not fit.

    Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """`rmsnorm_fn` that also takes the mean away, unless ``is_rms_norm``.

    >>> layernorm_fn(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2))
    tensor([[-1.0000,  1.0000]])

    Ba, Kiros & Hinton, Layer Normalization, arXiv 1607.06450.
    """
    channels = x.shape[-1]
    size = channels if group_size is None else group_size
    if size < 1 or channels % size:
        raise ValueError(f"group_size must divide the {channels} channels of x, got {group_size}")
    check("weight", weight, (channels,))
    check("bias", bias, (channels,))
    check("z", z, tuple(x.shape))
    gate = None if z is None else silu(to_accum(z))
    out = to_accum(x) if gate is None or norm_before_gate else to_accum(x) * gate
    groups = out.unflatten(-1, (-1, size))
    if not is_rms_norm:
        groups = groups - groups.mean(-1, keepdim=True)
    out = (groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * to_accum(weight)
    out = out if bias is None else out + to_accum(bias)
    return (out * gate if gate is not None and norm_before_gate else out).to(x.dtype)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` with its weight; mamba_ssm's modules import it as ``RMSNormGated``.

    >>> norm = RMSNorm(12, norm_before_gate=False)
    >>> norm(torch.randn(2, 10, 12), torch.randn(2, 10, 12)).shape
    torch.Size([2, 10, 12])
    """

    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class LayerNorm(RMSNorm):
    """`layernorm_fn` with its weight and bias.

    >>> LayerNorm(12)(torch.randn(2, 10, 12), torch.randn(2, 10, 12)).shape
    torch.Size([2, 10, 12])
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


RMSNormGated = RMSNorm
