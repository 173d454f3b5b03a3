"""Biases as the native kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.bias import Alibi, Bias, Dense, PerHead, RelativeTable
from foveate.kernels.cpu import call as c


class Biases:
    """The biases of a call, which must outlive it: what the arguments point at is kept here."""

    def __init__(self, biases: tuple[Bias, ...]) -> None:
        self._parameters = [bias.parameter.detach().float().contiguous() for bias in biases]
        pairs = zip(biases, self._parameters, strict=True)
        self.arguments = (c.BiasArgument * len(biases))(*(_argument(bias, parameter) for bias, parameter in pairs))
        self._grads: list[Tensor] = []

    def grads(self) -> list[Tensor]:
        """Where the kernels write the gradients, in float32."""
        self._grads = [torch.zeros_like(parameter) for parameter in self._parameters]
        for argument, grad in zip(self.arguments, self._grads, strict=True):
            argument.grad = c.pointer(grad, torch.float32, *grad.shape)
        return self._grads


def _argument(bias: Bias, parameter: Tensor) -> c.BiasArgument:
    address = c.pointer(parameter, torch.float32, *parameter.shape)
    argument = c.BiasArgument(data=address, size=parameter.numel())
    if isinstance(bias, Dense):
        sides = zip(parameter.shape, parameter.stride(), strict=True)
        argument.stride = c.Four(*(stride if size > 1 else 0 for size, stride in sides))
    elif isinstance(bias, PerHead):
        argument.stride = c.Four(0, int(parameter.numel() > 1), 0, 0)
    elif isinstance(bias, Alibi):
        argument.kind, argument.offset = c.ALIBI, bias.offset
    else:
        assert isinstance(bias, RelativeTable)
        argument.kind, argument.offset, argument.axes = c.RELATIVE, bias.offset, len(bias.reach)
        argument.dims, argument.reach = c.Four(*bias.dims), c.Four(*bias.reach)
    return argument
