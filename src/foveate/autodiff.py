"""Autograd around kernels: their gradients are kernels too, the gradients of those come from the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.plain import is_plain

Tensors = tuple[Tensor, ...]
Maybe = Sequence[Tensor | None]
Definition = Callable[..., Tensors]


class Kernel(Protocol):
    """One call of a kernel without its tensors; an input that is not given is None, and so is its gradient."""

    def forward(self, *inputs: Tensor | None) -> tuple[Tensors, Tensors]:
        """Outputs, and what else the backward pass reads."""

    def backward(self, saved: Tensors, grads: Tensors, *inputs: Tensor | None) -> Sequence[Tensor | None]:
        """The gradient of each input."""

    def definition(self, *inputs: Tensor | None) -> Tensors:
        """The outputs by torch's own operators."""


def run(kernel: Kernel, *inputs: Tensor | None) -> Tensors:
    """The outputs of a kernel, differentiable as often as one likes."""
    return _Forward.apply(kernel, *inputs)


def gradients(definition: Definition, inputs: Maybe, grads: Maybe, *, create_graph: bool) -> list[Tensor | None]:
    """Gradients of the inputs by way of the definition; zeros where it does not depend on one."""
    with torch.enable_grad():
        again = [_alias(x, create_graph) for x in inputs]
        return _gradients(definition, again, grads, create_graph)


def second_gradients(
    definition: Definition, inputs: Maybe, grads: Sequence[Tensor], wanted: Maybe, *, create_graph: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of the gradients that a kernel's backward pass returns, the gradients of ``grads`` and of the inputs.

    ``wanted`` are the gradients that arrive for what that pass returned.
    """
    with torch.enable_grad():
        again, grads_again = ([_alias(x, create_graph) for x in group] for group in (inputs, grads))
        first = _gradients(definition, again, grads_again, True)
        arriving = [(x, w) for x, w in zip(first, wanted, strict=True) if x is not None and w is not None]
        found = _grad([x for x, _ in arriving], [*grads_again, *again], [w for _, w in arriving], create_graph)
    return found[: len(grads)], found[len(grads) :]


def once(words: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the ``backward`` of an autograd.Function that is not to be differentiated: whoever does is told so.

    torch.autograd.function.once_differentiable loses the gradient without a word where only saved tensors lead to it.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run_once(ctx: Any, *grads: Tensor) -> Any:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return found
            given = [x for x in found if x is not None]
            in_turn = iter(_Refused.apply(words, len(given), *given, *grads, *ctx.saved_tensors))
            return tuple(None if x is None else next(in_turn) for x in found)

        return run_once

    return decorate


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, words: str, count: int, *tensors: Tensor) -> Tensors:
        ctx.words = words
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.words)


def _gradients(definition: Definition, inputs: Maybe, grads: Maybe, create_graph: bool) -> list[Tensor | None]:
    return _grad(definition(*inputs), inputs, grads, create_graph)


def _grad(outputs: Sequence[Tensor], inputs: Maybe, grads: Maybe, create_graph: bool) -> list[Tensor | None]:
    """torch.autograd.grad where some outputs depend on nothing, and some inputs are not given."""
    given = [x for x in inputs if x is not None]
    pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad and g is not None]
    if not pairs:
        return [None if x is None else torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [x for x, _ in pairs],
        given,
        [g.to(x.dtype) for x, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    in_turn = iter(found)
    return [None if x is None else next(in_turn) for x in inputs]


def _alias(x: Tensor | None, create_graph: bool) -> Tensor | None:
    """The same numbers at a place of their own in the graph: an input may depend on another, or be it."""
    if x is None:
        return None
    return x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()


_LIBRARY = torch.library.Library("foveate", "FRAGMENT")


def choice(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """An operator of torch's dispatcher whose output has no gradient: a mask, or what was chosen.

    Without autograd of its own, which torch.func asks of a torch.library.custom_op.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"foveate::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.foveate, name).default
    torch.library.register_vmap(f"foveate::{name}", partial(looped, operator), lib=_LIBRARY)
    return operator


def looped(operator: Any, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    """A rule for torch.vmap (torch.library.register_vmap): an operator is called once for each entry."""
    results = []
    for entry in range(info.batch_size):
        results.append(operator(*(_entry(x, dim, entry) for x, dim in zip(inputs, in_dims, strict=True))))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return (stacked, [0] * len(stacked)) if isinstance(results[0], list) else (tuple(stacked), (0,) * len(stacked))


def _entry(x: Any, dim: Any, entry: int) -> Any:
    if isinstance(x, list):
        return [_entry(one, at, entry) for one, at in zip(x, dim or [None] * len(x), strict=True)]
    return x if dim is None else x.select(dim, entry)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *inputs: Tensor | None) -> Tensors:
        outputs, saved = kernel.forward(*inputs)
        ctx.kernel, ctx.count = kernel, len(inputs)
        ctx.save_for_backward(*inputs, *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # once, as checkpointing asks
        inputs, saved = tensors[: ctx.count], tensors[ctx.count :]
        if not is_plain(*grads) or any(map(_is_batched, grads)):
            create_graph = torch.is_grad_enabled()
            return None, *gradients(ctx.kernel.definition, inputs, grads, create_graph=create_graph)
        return None, *_Backward.apply(ctx.kernel, saved, len(grads), *grads, *inputs)


def _is_batched(grad: Tensor) -> bool:
    """Whether a vmap of their own made it, that of jacobian(vectorize=True) and grad(is_grads_batched=True)."""
    key = torch._C._parse_dispatch_key("Batched")
    return key is not None and torch._C._dispatch_keys(grad).has(key)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, saved: Tensors, count: int, *tensors: Tensor | None) -> tuple[Any, ...]:
        ctx.kernel, ctx.count = kernel, count
        ctx.save_for_backward(*tensors)
        grads, inputs = tensors[:count], tensors[count:]
        return tuple(kernel.backward(saved, grads, *inputs))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        grads, inputs = tensors[: ctx.count], tensors[ctx.count :]
        of_grads, of_inputs = second_gradients(
            ctx.kernel.definition, inputs, grads, wanted, create_graph=torch.is_grad_enabled()
        )
        return None, None, None, *of_grads, *of_inputs
