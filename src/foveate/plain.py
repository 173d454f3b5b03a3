"""Which tensors are plain: memory that a kernel may read as it lies there, with nobody watching.

torch lets a tensor be a promise of one: fake, batched by vmap, dual with a tangent, a view that negates, a subclass;
and it lets whole regions be recorded instead of run. Kernels called by address see none of that. So every native path
asks here first; what is not plain goes through the operators of torch's dispatcher, which see all of it, or through
the definition in torch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from foveate.counting import num_observers

P = ParamSpec("P")
T = TypeVar("T")

_DERIVATIVES = (TransformType.Grad, TransformType.Jvp)
_TENSORS = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all tensors given are plain ones on the CPU, and operators run as they are called.

    >>> x = torch.randn(3, dtype=torch.complex64)
    >>> is_plain(x.real, None), is_plain(x.real, x.conj().imag), is_plain(x.real.to("meta"))
    (True, False, False)
    """
    if _watched():
        return False
    for x in tensors:  # a loop without calls, since decoding steps come by here
        if x is None:
            continue
        if type(x) not in _TENSORS or not x.is_cpu or x.layout is not torch.strided or x.is_neg() or x._is_zerotensor():
            return False
    return True


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the dispatcher: somebody looks on, or a tensor on any device is not plain.

    >>> traced(torch.zeros(3)), traced(torch.zeros(3, device="meta"))
    (False, True)
    """
    if torch.compiler.is_compiling():
        return True
    return _watched() or any(x is not None and (x.is_meta or not _is_memory(x)) for x in tensors)


def _watched() -> bool:
    """Whether operators are recorded or transformed rather than just run."""
    return (
        forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > num_observers()
        or _get_tracing_state() is not None
    )


def _is_memory(x: Tensor) -> bool:
    """Whether its numbers lie in its memory as they are, on whatever device; complex numbers no kernel reads."""
    return type(x) in _TENSORS and x.layout is torch.strided and not (x.is_neg() or x._is_zerotensor())


def transformed() -> bool:
    """Whether a transform of torch.func or forward mode is at work, which kernels have no rules for.

    >>> torch.vmap(lambda x: x * transformed())(torch.tensor([2.0]))
    tensor([2.])
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def differentiated() -> bool:
    """Whether such a transform takes derivatives: forward mode, or torch.func.grad and its like.

    >>> torch.vmap(lambda x: x * differentiated())(torch.tensor([2.0]))
    tensor([0.])
    """
    if not transformed():
        return False
    levels = get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() in _DERIVATIVES for level in levels)


def remembered(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """``lru_cache`` for functions that make tensors: always real ones on the CPU, which later calls can use.

    What is made while torch records is not kept, nor can a compiled graph reach into a cache; tensors made inside of
    ``torch.inference_mode`` would be refused by autograd outside of it.

    >>> places = remembered(8)(torch.arange)
    >>> with torch.inference_mode(), torch.device("meta"):
    ...     made = places(3)
    >>> made, made.is_inference()
    (tensor([0, 1, 2]), False)
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize=maxsize)
        def kept(*args: P.args, **options: P.kwargs) -> T:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*args, **options)

        @wraps(make)
        def made(*args: P.args, **options: P.kwargs) -> T:
            if torch.compiler.is_compiling() or _watched():
                return make(*args, **options)
            return kept(*args, **options)  # type: ignore[arg-type]

        return made

    return decorate
