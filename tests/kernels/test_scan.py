"""The scans' native kernels against the definition in float64: sizes, strides, precisions, threads, graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.support.native_checks import DTYPES, every_dtype, needs_native, one_thread
from tests.support.scan_inputs import (
    PER_TOKEN,
    Call,
    Operator,
    cast,
    conv_call,
    linear_call,
    outcome,
    positive,
    scan_call,
)
from torch import Tensor
from torch.library import opcheck

from foveate import causal_conv, linear_scan, scan
from foveate.recurrence.selective.impl import ops as scan_ops
from foveate.recurrence.selective.impl.scan_kernels import call_of
from foveate.recurrence.selective.inputs import ScanInputs

pytestmark = [needs_native, pytest.mark.usefixtures(one_thread.__name__)]
EPS = torch.finfo(torch.float32).eps

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels before tokens": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "a slice of channels": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every third channel": lambda x: x.repeat_interleave(3, -1)[..., ::3],
    "the same in all batch entries": lambda x: x[:1].expand_as(x),
    "the same token": lambda x: x[:, :1].expand_as(x),
}
OPERATORS = ((scan, scan_call), (linear_scan, linear_call), (causal_conv, conv_call))
every_call = pytest.mark.parametrize(
    ("operator", "make"), OPERATORS, ids=[operator.__name__ for operator, _ in OPERATORS]
)


def assert_agrees(
    operator: Operator, call: Call, dtype: torch.dtype, relaid: Callable[[Tensor], Tensor] | None = None
) -> None:
    """It errs at most twice as much as the definition does in this dtype, plus a rounding of all that is summed."""
    low = cast(call, dtype)
    if relaid is not None:
        low |= {name: relaid(low[name].detach()).requires_grad_() for name in PER_TOKEN[operator] if name in low}
    exact = cast(low, torch.float64)
    truths, plains, actuals = (
        outcome(operator, one, impl) for one, impl in ((exact, "reference"), (low, "reference"), (low, "native"))
    )
    sums = outcome(operator, positive(exact), "reference", signs=False)
    for name, truth in truths.items():
        actual, plain = actuals[name], plains[name]
        assert actual.dtype == plain.dtype and actual.shape == truth.shape, name
        errors = [float((x.double() - truth).norm()) for x in (actual, plain)]
        luck = 8 if truth.numel() < 64 else 1  # over a few numbers, plain arithmetic may hit the exact ones
        rounding = luck * torch.finfo(actual.dtype).eps / 2 * float(truth.norm())
        allowed = 2 * errors[1] + rounding + 4 * EPS * float(sums[name].norm())
        assert errors[0] <= allowed, f"{name} in {dtype}: error {errors[0]:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("states", [1, 3, 16, 17])
@pytest.mark.parametrize("channels", [1, 7, 33])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 130])
def test_scan_of_any_size(channels: int, states: int, length: int) -> None:
    assert_agrees(scan, scan_call(channels, states, length), torch.float32)


@pytest.mark.parametrize("channels", [1, 7, 33, 300])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 130])
def test_linear_scan_of_any_size(channels: int, length: int) -> None:
    assert_agrees(linear_scan, linear_call(channels, length), torch.float32)


@pytest.mark.parametrize(("channels", "width"), [(1, 1), (7, 4), (33, 3), (300, 4), (5, 64)])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 130])
def test_convolution_of_any_size(channels: int, width: int, length: int) -> None:
    assert_agrees(causal_conv, conv_call(channels, width, length), torch.float32)


@pytest.mark.parametrize(("channels", "groups_b", "groups_c"), [(12, 12, 1), (12, 4, 6), (70, 2, 2), (300, 1, 2)])
def test_channels_in_groups(channels: int, groups_b: int, groups_c: int) -> None:
    call = scan_call(channels, 5, 70, groups=groups_b)
    assert_agrees(scan, call | {"C": scan_call(channels, 5, 70, groups=groups_c)["C"]}, torch.float32)


@pytest.mark.parametrize("without", [["D"], ["z"], ["dt_bias"], ["D", "z", "dt_bias", "state"]])
def test_what_may_be_left_out(without: list[str]) -> None:
    call = {name: v for name, v in scan_call(19, 3, 66).items() if name not in without}
    assert_agrees(scan, call, torch.float32)
    assert_agrees(scan, call | {"softplus": False, "dt": call["dt"].abs(), "dt_bias": None}, torch.float32)
    plain = {name: v for name, v in conv_call(19, 3, 66).items() if name not in ("bias", "tail", "activation")}
    assert_agrees(causal_conv, plain, torch.float32)


@every_dtype
@every_call
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(operator: Operator, make: Callable[..., Call], layout: str, dtype: torch.dtype) -> None:
    assert_agrees(operator, make(19, 3, 67) if make is not linear_call else make(19, 67), dtype, LAYOUTS[layout])


def test_each_tensor_may_have_a_precision_of_its_own() -> None:
    call = scan_call(19, 3, 67)
    mixed = {name: v for name, v in call.items() if not isinstance(v, Tensor) or name == "state"}
    for i, (name, v) in enumerate(item for item in call.items() if item[0] not in mixed):
        mixed[name] = v.to(DTYPES[i % 3])
    mixed["state"] = call["state"].float()
    tensors = {name: v.requires_grad_() for name, v in mixed.items() if isinstance(v, Tensor)}
    actual, plain = (outcome(scan, mixed | tensors, impl) for impl in ("native", "reference"))
    for name, x in actual.items():
        assert x.dtype == plain[name].dtype, name
        torch.testing.assert_close(x, plain[name], rtol=max(1e-4, 2 * torch.finfo(x.dtype).eps), atol=1e-4)


@every_dtype
@pytest.mark.parametrize(("channels", "states", "groups"), [(1, 1, 1), (7, 17, 7), (33, 3, 3), (150, 16, 1)])
def test_one_token_without_gradients_is_the_definition(
    channels: int, states: int, groups: int, dtype: torch.dtype
) -> None:
    """It takes a short way of its own."""
    low = cast(scan_call(channels, states, 1, groups=groups), dtype)
    low |= {name: low[name].float() for name in ("A", "D", "dt_bias")}
    with torch.no_grad():
        found, expected = scan(**low), scan(**low, impl="reference")
        torch.testing.assert_close(found.out, expected.out, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
        torch.testing.assert_close(found.state, expected.state)
        bare = {name: low[name] for name in ("x", "dt", "A", "B", "C", "softplus")}
        torch.testing.assert_close(scan(**bare), scan(**bare, impl="reference"), rtol=2e-2, atol=2e-5)
        for change in ({"A": -low["A"] + 1e-3}, {"dt": -low["dt"].abs(), "dt_bias": None, "softplus": False}):
            with pytest.raises(ValueError, match=r"A must be at most 0|steps dt must be at least 0"):
                scan(**(low | change))


@every_call
def test_any_number_of_threads_gives_the_same(operator: Operator, make: Callable[..., Call]) -> None:
    call = cast(make(300, 16, 130) if make is not linear_call else make(300, 600), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outcome(operator, call, "native"))
    torch.set_num_threads(before)
    for name, x in results[0].items():
        assert all(torch.equal(x, other[name]) for other in results[1:]), name


def test_graphs_take_the_operators_whole() -> None:
    call = cast(scan_call(7, 3, 70), torch.float32)
    taps = cast(conv_call(7, 3, 70), torch.float32)

    def everything(call: Call, taps: Call) -> Tensor:
        convolved, tail = causal_conv(**taps, impl="native")
        out, state = scan(**(call | {"x": convolved}), impl="native")
        return linear_scan(out, -call["z"].abs(), impl="native").out.sum() + state.sum() + tail.sum()

    inputs = [v for v in (*call.values(), *taps.values()) if isinstance(v, Tensor) and v is not call["x"]]
    plain, compiled = everything(call, taps), torch.compile(everything, fullgraph=True, backend="aot_eager")(call, taps)
    torch.testing.assert_close(compiled, plain)
    grads = (torch.autograd.grad(result, inputs) for result in (compiled, plain))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("lengths", [None, [30, 0, 40]])
@pytest.mark.parametrize("keep", [True, False])
def test_the_operators_are_what_torch_expects(keep: bool, lengths: list[int] | None) -> None:
    batch = 3 if lengths else 1
    call = cast(scan_call(7, 3, 70, batch=1) | {"state": scan_call(7, 3, batch=batch)["state"]}, torch.float32)
    fields = call_of(ScanInputs(**{k: v for k, v in call.items() if k != "state"}), call["state"], lengths)
    opcheck(scan_ops.scan, (*fields, keep))
    taps = cast(conv_call(7, 3, 70, batch=1) | {"tail": conv_call(7, 3, batch=batch)["tail"]}, torch.float32)
    tensors = (taps[name] for name in ("x", "weight", "bias", "tail"))
    opcheck(scan_ops.conv, (*tensors, True, lengths))


def test_what_they_do_not_take() -> None:
    call = cast(scan_call(), torch.float32)
    with pytest.raises(NotImplementedError, match="not z's float64"):
        scan(**(call | {"z": call["z"].double(), "state": None}), impl="native")
    with pytest.raises(NotImplementedError, match="up to 64 taps, not 65"):
        causal_conv(torch.ones(1, 3, 2), torch.ones(2, 65), impl="native")
