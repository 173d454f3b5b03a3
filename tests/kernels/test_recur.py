"""The native kernels of `recur` against its definition: every form of a call, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.native_checks import LAYOUTS, needs_native
from tests.support.recur_inputs import DECAYS, UPDATES, Inputs, cut, make_inputs, recur, spread, step, summed
from torch import Tensor
from torch.testing import assert_close

from foveate.options import forced_impl

pytestmark = needs_native
every_decay = pytest.mark.parametrize("decay", DECAYS)
every_update = pytest.mark.parametrize("update", UPDATES)


def outcome(inputs: Inputs, impl: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    """Out, the last state, and all gradients of a random weighting of both."""
    leaves = {name: x.detach().to(wider(name, dtype)).requires_grad_() for name, x in inputs.items()}
    out, state = recur(**leaves, impl=impl, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=generator).to(x.dtype) * x).sum() for x in (out, state))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "last state": state} | dict(zip(leaves, grads, strict=True))


def wider(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if name == "state" else dtype


def assert_errs_no_more(inputs: Inputs, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Than twice the definition in the same precision, and a few roundings of the result."""
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    exact, apart = (outcome(x, "reference", torch.float64, **options) for x in (inputs, spread(inputs)))
    plain, actual = (outcome(inputs, impl, dtype, **options) for impl in ("reference", "native"))
    for name, expected in exact.items():
        assert actual[name].dtype == plain[name].dtype
        size = rms(summed(expected, apart[name]))
        luck = 16 if effective_count(expected) < 64 else 4  # over a few numbers, a plain loop may hit the exact ones
        allowed = 2 * rms(plain[name] - expected) + luck * torch.finfo(actual[name].dtype).eps * size + 1e-30
        assert rms(actual[name] - expected) <= allowed, name


def effective_count(x: Tensor) -> float:
    """How many numbers make up the root mean square: one, if the others are next to nothing beside it."""
    squares = x.detach().double().square()
    return float(squares.sum() ** 2 / squares.square().sum().clamp_min(1e-300))


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


@every_decay
@every_update
@pytest.mark.parametrize("heads", [(4, 4, 4, 4), (4, 1, 2, 2), (6, 2, 3, 1)])
def test_values_and_gradients(decay: str, update: str, heads: tuple) -> None:
    assert_errs_no_more(make_inputs(decay, update, heads=heads, length=70, dims=(33, 21)))


@every_update
@pytest.mark.parametrize("dims", [(1, 1), (2, 3), (5, 64), (64, 16), (17, 65), (70, 130), (256, 31), (300, 8)])
def test_any_two_head_dims(update: str, dims: tuple[int, int]) -> None:
    for decay in ("token", "channel"):
        assert_errs_no_more(make_inputs(decay, update, length=19, dims=dims))


@every_update
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 131])
def test_any_length(update: str, length: int) -> None:
    assert_errs_no_more(make_inputs("channel", update, length=length))


@every_update
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(update: str, dtype: torch.dtype) -> None:
    assert_errs_no_more(make_inputs("token", update, heads=(4, 2, 2, 4), length=67, dims=(24, 40)), dtype)


@every_update
@pytest.mark.parametrize("relaid", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(update: str, relaid: Any) -> None:
    inputs = make_inputs("channel", update, length=20, dtype=torch.float32)
    moved = {name: relaid(x) if x.dim() == 4 else x for name, x in inputs.items()}
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in moved.items()}
    for actual, expected in zip(recur(**moved, impl="native"), recur(**copies, impl="native"), strict=True):
        assert torch.equal(actual, expected)
    assert_close(outcome(moved, "native"), outcome(copies, "native"))


@every_update
def test_packed_sequences(update: str) -> None:
    lengths = (5, 0, 64, 1, 0, 71)
    inputs = make_inputs("token", update, batch=1, heads=(4, 2, 2, 2), length=sum(lengths))
    inputs["state"] = torch.randn(len(lengths), *inputs["state"].shape[1:], dtype=torch.float64)
    assert_errs_no_more(inputs, lengths=lengths)


@every_decay
@every_update
def test_steps_equal_one_call(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, length=9, dtype=torch.float32)
    whole, state = recur(**inputs, impl="native"), inputs["state"]
    for t in range(9):
        out, state = step(**{**cut(inputs, t, t + 1), "state": state})
        assert_close(out, whole.out[:, :, t : t + 1])
    assert_close(state, whole.state)


@every_update
def test_as_many_threads_as_one_likes(update: str) -> None:
    """Outputs do not depend on it, with states enough to share, and with one that is cut up."""
    before = torch.get_num_threads()
    try:
        for heads in ((3, 3, 3, 3), (1, 1, 1, 1)):
            inputs = make_inputs("channel", update, batch=1, heads=heads, length=70, dims=(9, 70), dtype=torch.float32)
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(outcome(inputs, "native"))
            for other in found[1:]:
                assert all(torch.equal(other[name], found[0][name]) for name in other)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@every_update
def test_resets_and_strong_decay(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, length=65, strength=100.0)
    inputs["decay"].view(-1)[::2] = -torch.inf
    assert_errs_no_more(inputs)


def test_forgets_at_the_right_rate_over_100000_tokens() -> None:
    inputs = make_inputs("head", batch=1, length=100_001, dims=(2, 2), strength=1e-5, dtype=torch.float32)
    inputs["v"][:, :, 1:] = 0
    inputs["state"].zero_()
    first = inputs["k"][:, :, 0, :, None] * inputs["v"][:, :, 0, None, :]
    kept = (100_000 * inputs["decay"].double()).exp()[None, :, None, None]
    slack = 100_000 * torch.finfo(torch.float32).eps  # a unit of rounding in the factor, at every token
    assert_close(recur(**inputs, impl="native").state.double(), first * kept, rtol=slack, atol=0)


@every_update
@pytest.mark.parametrize("length", [1, 70])
def test_operators_keep_the_rules_of_the_dispatcher(update: str, length: int) -> None:
    inputs = make_inputs("token", update, length=length, dtype=torch.float32)
    gates = [inputs[name].unsqueeze(-1) if name in inputs else None for name in ("decay", "beta")]
    tensors = [inputs["q"], inputs["k"], inputs["v"], *gates, inputs.get("a"), inputs.get("b"), inputs["state"]]
    settings = [None, 0.3, "bonus" in update]
    out, state, checkpoints = torch.ops.foveate.recur_forward(*tensors, *settings, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.foveate.recur_forward.default, (*tensors, *settings, True), test_utils=tests)
    arguments = (torch.ones_like(out), state, *tensors, checkpoints, *settings)
    torch.library.opcheck(torch.ops.foveate.recur_backward.default, arguments, test_utils=tests)


@every_update
def test_compiles_into_one_graph_with_its_backward(update: str) -> None:
    inputs = make_inputs("channel", update, length=20, dtype=torch.float32)
    compiled = torch.compile(lambda **x: recur(**x, impl="native"), fullgraph=True, dynamic=False, backend="aot_eager")

    def run(function: Any) -> list[Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out, state = function(**leaves)
        return [out, *torch.autograd.grad(out.square().sum() + state.sum(), list(leaves.values()))]

    assert_close(run(compiled), run(lambda **x: recur(**x, impl="native")))


@every_decay
@every_update
def test_the_short_way_for_plain_calls_is_the_long_way(decay: str, update: str) -> None:
    inputs = make_inputs(decay, update, heads=(4, 2, 1, 2), length=5, dtype=torch.float32)
    for state in (inputs.pop("state"), None):
        short, long = (recur(**inputs, state=state, impl=impl) for impl in ("auto", "native"))
        assert all(torch.equal(*pair) for pair in zip(short, long, strict=True))


@pytest.mark.parametrize("impl", ["auto", "native"])
@pytest.mark.parametrize(("name", "wrong"), [("decay", 0.1), ("decay", torch.nan), ("beta", 2.1), ("beta", -0.1)])
def test_a_gate_out_of_range_is_noticed_wherever_it_is(impl: str, name: str, wrong: float) -> None:
    for decay in ("token", "channel"):
        inputs = make_inputs(decay, "delta", length=70, dtype=torch.float32)
        inputs[name].view(-1)[-1] = wrong
        with pytest.raises(ValueError, match=f"{name} (is a logarithm|must lie)"):
            recur(**inputs, impl=impl)


def test_auto_takes_it() -> None:
    inputs = make_inputs("token", "delta", dtype=torch.float32)
    for actual, expected in zip(recur(**inputs), recur(**inputs, impl="native"), strict=True):
        assert torch.equal(actual, expected)
    with forced_impl("reference"):
        assert_close(recur(**inputs), recur(**inputs, impl="reference"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "not float64"),
        ({"causal": False}, "the causal form only"),
        ({"dims": (513, 2)}, "up to 512 channels a key, not 513"),
    ],
)
def test_refuses_in_words(changes: dict, words: str) -> None:
    options = {name: changes.pop(name) for name in ("causal",) if name in changes}
    inputs = make_inputs(**{"length": 3, "dtype": torch.float32, **changes})
    with pytest.raises(NotImplementedError, match=f"impl='native' cannot run this call: .*{words}"):
        recur(**inputs, **options, impl="native")
