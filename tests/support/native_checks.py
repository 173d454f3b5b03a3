"""A call of `attend` in any precision beside the same call in float64, and how far apart they may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from tests.support.attend_inputs import leaves
from torch import Tensor

from foveate import Weights, attend_partial, full
from foveate.attention import Bias
from foveate.attention.call import Call, prepare
from foveate.kernels.cpu.loader import library, status
from foveate.patterns.algebra import Scene, resolve
from foveate.patterns.select.dense import dense_mask

needs_native = pytest.mark.skipif(library() is None, reason=f"no native kernels: {status().reason}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
EPS = torch.finfo(torch.float32).eps

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels before tokens": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "a slice of channels": lambda x: torch.cat([x, x, x], -1)[..., x.shape[3] : 2 * x.shape[3]],
    "every second token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every third channel": lambda x: x.repeat_interleave(3, 3)[..., ::3],
    "the same in all batch entries": lambda x: x[:1].expand_as(x),
    "the same in all heads": lambda x: x[:, :1].expand_as(x),
    "the same token": lambda x: x[:, :, :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Enough for small calls: two threads wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A call, or a part of it, with its floating tensors in another dtype: leaves of their own graph."""
    if isinstance(value, dict):
        return {name: cast(part, dtype) for name, part in value.items()}
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype).requires_grad_()
    if isinstance(value, Bias | Weights):
        return replace(value, **{field.name: cast(getattr(value, field.name), dtype) for field in fields(value)})
    return value


def outcome(call: dict[str, Any], seeds: tuple[Tensor, Tensor], impl: str) -> list[Tensor]:
    """Heads out, log row sums (zeros for weights without) and the gradient of every leaf."""
    out, lse = attend_partial(**call, impl=impl)
    grads = [seeds[0].to(out.dtype)]
    results = [out]
    if lse is not None:
        sees_none = lse.isneginf()
        grads.append(torch.where(sees_none, 0, seeds[1].to(lse.dtype)))
        results.append(lse)
    inputs = leaves({"bias": None, "weights": None} | call)
    found = torch.autograd.grad(results, inputs, grads, allow_unused=True, materialize_grads=True)
    return [out.detach(), torch.zeros(out.shape[:3]) if lse is None else lse.detach(), *found]


def assert_native_agrees(
    call: dict[str, Any],
    dtype: torch.dtype,
    relaid: Callable[[Tensor], Tensor] | None = None,
    *,
    threads: Iterable[int] = (1,),
) -> None:
    """Native errs at most twice as much as the definition in this dtype, plus a rounding of all that is summed.

    ``relaid`` puts q, k, v and the gradient of the result elsewhere in memory; native runs on each number of threads.
    """
    low = decided(cast(call, dtype))
    shape = (*low["q"].shape[:3], low["v"].shape[3])
    seeds = torch.randn(shape).to(dtype), torch.randn(shape[:3]).to(dtype)
    if relaid is not None:
        low |= {name: relaid(low[name].detach()).requires_grad_() for name in "qkv"}
        seeds = relaid(seeds[0]), seeds[1]
    exact = cast(low, torch.float64)
    truths, plains = (outcome(one, seeds, "reference") for one in (exact, low))
    names = ["out", "lse", "dq", "dk", "dv", *(f"gradient {i}" for i in range(len(truths) - 5))]
    # Weights that are rounded to half precision need no exact exponentials, and their sums do not get them.
    noises = [max(EPS, torch.finfo(dtype).eps / 64) if name == "lse" else EPS for name in names]
    summed = [noise * size for noise, size in zip(noises, sizes(exact, seeds), strict=True)]
    for count in threads:
        torch.set_num_threads(count)
        actuals = outcome(low, seeds, "native")
        for name, truth, plain, actual, sums in zip(names, truths, plains, actuals, summed, strict=True):
            assert actual.dtype == (torch.float32 if name == "lse" else dtype), name
            assert_errs_no_more(f"{name} in {dtype} on {count} threads", actual, plain, truth, sums)


def assert_errs_no_more(what: str, actual: Tensor, plain: Tensor, truth: Tensor, sums: Tensor) -> None:
    assert actual.shape == truth.shape, f"{what}: {tuple(actual.shape)}, not {tuple(truth.shape)}"
    strange = ~truth.isfinite()
    assert torch.equal(actual.double()[strange], truth[strange]), f"{what}: infinite at other places"
    fits = truth.abs() < 0.99 * torch.finfo(actual.dtype).max
    plain = torch.where(plain.isfinite(), plain, truth)  # where it overflows it is no measure
    errors = [float((x.double() - truth)[fits].norm()) for x in (actual, plain)]
    # Over a few numbers, plain arithmetic may hit the exact ones.
    luck = 8 if truth.numel() < 64 else 2 if truth.numel() < 256 else 1
    rounding = luck * torch.finfo(actual.dtype).eps * float(truth[fits].norm())
    sums = sums.reshape(truth.shape) if sums.numel() == truth.numel() else sums.sum_to_size(truth.shape)
    allowed = 2 * errors[1] + rounding + 2 * float(sums[fits].norm())
    said = f"{what}: error {errors[0]:.3g}, allowed {allowed:.3g}"
    assert errors[0] <= allowed, f"{said}; the definition's {errors[1]:.3g}, a rounding {rounding:.3g}"


def decided(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its pattern's choices taken, so that rounding does not change them."""
    pattern, q, k = call.get("pattern", full), call["q"].detach(), call["k"].detach()
    if not pattern.is_dynamic:
        return call
    scene = Scene(q.shape[2], k.shape[2], q=q, k=k, scale=call.get("scale") or q.shape[3] ** -0.5)
    return call | {"pattern": resolve(pattern, scene)}


def sizes(options: dict[str, Any], seeds: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What is added up in each result, without its signs: what is left of sums that cancel is no measure of errors.

    Each term counts as often as the numbers in its logit, as those are rounded too.
    """
    defaults = {"pattern": full, "bias": None, "weights": "softmax", "scale": None, "softcap": None, "layout": None}
    call, sink = prepare(**(defaults | options), needs_lse=True)
    with torch.no_grad():
        return _Sizes(call, sink).of(*(seed.double().abs() for seed in seeds))


@dataclass
class _Sizes:
    call: Call
    sink: Tensor | None

    def of(self, d_out: Tensor, d_lse: Tensor) -> list[Tensor]:
        call, k, v = self.call, self._of_heads(self.call.k).abs(), self._of_heads(self.call.v).abs()
        logits, noise = self._logits()
        weights, lse = self._weights(logits)
        noisy = weights * noise if call.kind != "relu" else noise * (logits >= -4 * EPS * noise)
        row_noise = noisy.sum(-1, keepdim=True) if call.kind == "softmax" else torch.ones(())
        if call.kind == "softmax":
            noisy = noisy + weights * row_noise
        out = noisy @ v
        d_weights = d_out @ v.mT
        if call.kind == "softmax":
            d_weights = d_weights + (d_out * out).sum(-1, keepdim=True) + d_lse.unsqueeze(-1)
        slope = noisy if call.kind != "relu" else self._kinks(logits, noise)
        d_logits = slope * d_weights
        d_products = abs(call.scale) * d_logits
        return [
            out,
            lse.nan_to_num(neginf=0).abs() + row_noise.squeeze(-1).expand_as(lse),
            d_products @ k,
            self._of_groups(d_products.mT @ call.q.abs(), call.k),
            self._of_groups(noisy.mT @ d_out, call.v),
            *(self._of_bias(bias, d_logits) for bias in call.biases),
            *([] if self.sink is None else [self._of_sink(d_out, out, d_lse, row_noise)]),
        ]

    def _of_heads(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.call.heads // x.shape[1], 1)

    def _of_groups(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(1, (like.shape[1], -1)).sum(2)

    def _logits(self) -> tuple[Tensor, Tensor]:
        call = self.call
        logits = call.scale * call.q @ self._of_heads(call.k).mT
        noise = 1 + abs(call.scale) * call.q.abs() @ self._of_heads(call.k).abs().mT
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        for bias in call.biases:
            values = bias.values(*places(logits))
            logits, noise = logits + values, noise + values.abs().nan_to_num(posinf=0)
        visible = self._visible()
        return torch.where(visible, logits, -torch.inf), torch.where(visible, noise, 0)

    def _visible(self) -> Tensor:
        call = self.call
        scene = Scene(call.num_queries, call.num_keys, call.layout, call.q, call.k, call.scale)
        mask = dense_mask(resolve(call.pattern, scene), scene)
        return mask.repeat_interleave(call.heads // mask.shape[1], 1)

    def _weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.call.kind != "softmax":
            weights = torch.sigmoid(logits) if self.call.kind == "sigmoid" else torch.relu(logits)
            return weights, torch.zeros(logits.shape[:3])
        lse = torch.logsumexp(logits, -1) if logits.shape[-1] else torch.full(logits.shape[:3], -torch.inf).double()
        if self.sink is not None:
            lse = torch.logaddexp(lse, self.sink.view(-1, 1).expand_as(lse))
        return torch.exp(logits - torch.where(lse.isinf(), 0, lse).unsqueeze(-1)), lse

    def _kinks(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Slopes of ReLU, which jump where a logit's rounding may change its sign."""
        return (logits > 0) * noise + (logits.abs() <= 4 * EPS * noise) / EPS

    def _of_bias(self, bias: Bias, d_logits: Tensor) -> Tensor:
        total = torch.zeros(bias.parameter.numel(), dtype=torch.float64)
        bias.add_grad(total, d_logits, *places(d_logits))
        return total.abs().view_as(bias.parameter)

    def _of_sink(self, d_out: Tensor, out: Tensor, d_lse: Tensor, row_noise: Tensor) -> Tensor:
        return (((d_out * out).sum(-1) + d_lse) * (1 + row_noise.squeeze(-1))).sum((0, 2))


def places(pairs: Tensor) -> Iterable[Tensor]:
    """Batch entry, head, query and key of each pair (B, H, N, M), to broadcast."""
    return (
        torch.arange(size).view([-1 if axis == dim else 1 for axis in range(4)]) for dim, size in enumerate(pairs.shape)
    )
