"""What `recur` refuses, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.plain import is_plain
from foveate.recurrence.linear.inputs import Tokens


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None,
    beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    bonus: Tensor | None,
    lengths: Sequence[int] | None,
    causal: bool,
) -> None:
    a, b = (None, None) if low_rank is None else _pair(low_rank)
    named = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "a": a, "b": b, "bonus": bonus}
    given = {name: x for name, x in named.items() if x is not None}
    _check_kinds(given)
    _check_qkv(q, k, v)
    if not causal and any(x is not None for x in (decay, beta, low_rank, bonus)):
        raise ValueError("causal=False sums over all tokens alike: it takes neither decay nor beta, low_rank or bonus")
    if beta is not None and (low_rank is not None or bonus is not None):
        raise ValueError(
            "beta stands for the delta rule: it takes neither low_rank (which has it as a = exp(decay) k, b = -beta k) "
            "nor bonus"
        )
    if k.size(2) != q.size(2) and (causal or lengths is not None):
        raise ValueError(
            f"q has {q.size(2)} tokens and k {k.size(2)}; they may differ only with causal=False and without lengths"
        )
    if decay is not None:
        _check_decay(q, decay)
    if beta is not None:
        _check_beta(q, beta)
    for name, x in (("a", a), ("b", b)):
        if x is not None:
            _check_low_rank(name, q, x)
    if a is not None and b is not None and a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b of low_rank must have as many heads, got {a.shape[1]} and {b.shape[1]}")
    if bonus is not None and tuple(bonus.shape) not in ((q.shape[1], q.shape[3]), tuple(q.shape)):
        raise ValueError(
            f"bonus must be (H, D) = {(q.shape[1], q.shape[3])} or q's {tuple(q.shape)}, got {tuple(bonus.shape)}"
        )
    if lengths is not None:
        _check_lengths(q, lengths)


def check_ranges(decay: Tensor | None, beta: Tensor | None) -> None:
    """Refuse what would make the state grow without bound."""
    if decay is not None and _readable(decay) and not bool((decay <= 0).all()):
        raise ValueError(
            f"decay is a logarithm, at most 0, but reaches {decay.detach().max().item():.4g}; "
            "if you hold factors in [0, 1], pass decay.log()"
        )
    if beta is not None and _readable(beta) and not bool(((beta >= 0) & (beta <= 2)).all()):
        low, high = (x.item() for x in beta.detach().aminmax())
        raise ValueError(f"beta must lie in [0, 2], but spans [{low:.4g}, {high:.4g}]; is a sigmoid missing?")


def check_ranges_of(tokens: Tokens) -> None:
    """`check_ranges` of a call whose kernels do not look at every number themselves."""
    check_ranges(tokens.decay if tokens.fades else None, tokens.beta)


def check_chunk(chunk: int) -> None:
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two, got {chunk}; 64 suits most calls")


def check_dense(name: str, x: object) -> None:
    """An argument that must be a tensor with strides, nothing sparse."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; torch.as_tensor makes one of numbers")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}; pass {name}.to_dense()")


def check_state(state: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    check_dense("state", state)
    if tuple(state.shape) != tuple(shape):
        raise ValueError(f"state must be (sequences, state heads, D, Dv) = {tuple(shape)}, got {tuple(state.shape)}")
    if state.dtype != dtype:
        raise TypeError(f"state must be {dtype} for these q, k, v, got {state.dtype}; pass state.to({dtype})")
    if state.device != device:
        raise ValueError(f"state must be on q's device {device}, got {state.device}")


def _check_kinds(given: dict[str, Tensor]) -> None:
    for name, x in given.items():
        check_dense(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
        if x.device != given["q"].device:
            raise ValueError(f"{name} is on {x.device} but q on {given['q'].device}; move them to one device")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v must be (batch, heads, length, dim), got {shapes}")
    if not q.size(0) == k.size(0) == v.size(0):
        raise ValueError(f"q, k and v must share their batch size, got {shapes}")
    if q.size(3) != k.size(3):
        raise ValueError(f"q and k must share their head dim, got {shapes}")
    if k.size(2) != v.size(2):
        raise ValueError(f"k and v must have the same length, got {shapes}")
    if 0 in (q.size(1), q.size(3), v.size(3)):
        raise ValueError(f"heads and dims must be at least 1, got {shapes}")
    _check_heads("k", k.size(1), q)
    _check_heads("v", v.size(1), q)


def _check_heads(name: str, heads: int, q: Tensor) -> None:
    if heads < 1 or q.size(1) % heads:
        raise ValueError(f"{name} has {heads} heads, which do not divide the {q.size(1)} heads of q")


def _check_decay(q: Tensor, decay: Tensor) -> None:
    batch, _, length, dim = q.shape
    heads = decay.size(min(1, decay.dim() - 1)) if decay.dim() else 0
    if tuple(decay.shape) not in ((heads,), (batch, heads, length), (batch, heads, length, dim)):
        raise ValueError(
            "decay must be (heads,), (B, heads, N) or (B, heads, N, D) "
            f"with B, N, D = {batch}, {length}, {dim}, got {tuple(decay.shape)}"
        )
    _check_heads("decay", heads, q)


def _check_beta(q: Tensor, beta: Tensor) -> None:
    batch, _, length, _ = q.shape
    if beta.dim() != 3 or (beta.size(0), beta.size(2)) != (batch, length):
        raise ValueError(f"beta must be (B, heads, N) with B, N = {batch}, {length}, got {tuple(beta.shape)}")
    _check_heads("beta", beta.size(1), q)


def _pair(low_rank: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(low_rank, tuple | list) or len(low_rank) != 2:
        raise TypeError(f"low_rank is a pair (a, b) of tensors, got {type(low_rank).__name__}")
    for name, x in zip("ab", low_rank, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    return low_rank[0], low_rank[1]


def _check_low_rank(name: str, q: Tensor, x: Tensor) -> None:
    batch, _, length, dim = q.shape
    if x.dim() != 4 or (x.size(0), x.size(2), x.size(3)) != (batch, length, dim):
        raise ValueError(
            f"{name} of low_rank must be (B, heads, N, D) with B, N, D = {batch}, {length}, {dim}, got {tuple(x.shape)}"
        )
    _check_heads(name, x.size(1), q)


def _check_lengths(q: Tensor, lengths: Sequence[int]) -> None:
    if q.size(0) != 1:
        raise ValueError(f"packed sequences need batch size 1, got {q.size(0)}; lay them out along the length")
    if len(lengths) == 0 or min(lengths) < 0:
        raise ValueError(f"lengths must name at least one sequence, none shorter than 0, got {list(lengths)}")
    if sum(lengths) != q.size(2):
        raise ValueError(f"lengths sum to {sum(lengths)}, but q, k and v have {q.size(2)} tokens")


def _readable(x: Tensor) -> bool:
    """Whether its values can be looked at without breaking a graph or waiting for a device."""
    return not torch.compiler.is_compiling() and is_plain(x.resolve_neg() if x.is_cpu else x)
