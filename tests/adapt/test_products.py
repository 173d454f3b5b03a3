"""Products by the faster library are F.linear's, gradients included, and come and go with `accelerate`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.adapt.hf import products
from foveate.adapt.hf.products import linear

EPSILON = torch.finfo(torch.float32).eps


def choose(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, library)
    products.faster.cache_clear()


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not products._has_onednn():
        pytest.skip("needs a torch with oneDNN")
    monkeypatch.setattr(products, "SMALL", 1)
    choose("onednn", monkeypatch)
    yield
    monkeypatch.undo()
    products.faster.cache_clear()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    own = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *args: seen.append(args[0]) or own(*args))
    return seen


def results(product: object, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    inputs = [None if t is None else t.detach().to(grad.dtype).requires_grad_() for t in inputs]
    out = product(*inputs)
    return [out, *torch.autograd.grad(out, [t for t in inputs if t is not None], grad)]


def assert_no_worse(inputs: list[Tensor | None], grad: Tensor) -> None:
    """Twice F.linear's error, and the bound on a float32 sum in any order: both may be wrong by that much."""
    found, plain = results(linear, inputs, grad), results(F.linear, inputs, grad)
    exact = results(F.linear, inputs, grad.double())
    sizes = [None if t is None else t.abs() for t in inputs]
    bounds = results(F.linear, sizes, grad.double().abs())
    terms = max(inputs[0].shape[-1], inputs[1].shape[0], grad[..., 0].numel()) + 1
    for ours, theirs, true, size in zip(found, plain, exact, bounds, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ((ours - true).abs() <= 2 * (theirs - true).abs() + terms * EPSILON * size).all()


@pytest.mark.parametrize("shape", [(37,), (1, 37), (53, 37), (2, 19, 37), (2, 3, 5, 37)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(shape: tuple[int, ...], with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    assert_no_worse(
        [torch.randn(shape), torch.randn(23, 37), torch.randn(23) if with_bias else None], torch.randn(*shape[:-1], 23)
    )
    assert len(seen) == 3


def test_inputs_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    weight, bias = torch.randn(23, 37), torch.randn(23)
    for x in (
        torch.randn(37, 11).t(),
        torch.randn(11, 74)[:, ::2],
        torch.randn(1, 37).expand(11, 37),
        torch.randn(5, 3, 37).transpose(0, 1),
        torch.randn(11 * 37 + 1)[1:].view(11, 37),
    ):
        assert_no_worse([x, weight, bias], torch.randn(23, *x.shape[:-1]).movedim(0, -1))
    assert len(seen) == 15
    for weight in (torch.randn(37, 23).t(), torch.randn(23, 74)[:, ::2]):
        assert torch.equal(linear(torch.ones(4, 37), weight), F.linear(torch.ones(4, 37), weight))
    assert len(seen) == 15


@pytest.mark.parametrize("shape", [(0, 37), (2, 0, 37), (3, 0)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    inputs = [torch.randn(shape), torch.randn(23, shape[-1]), torch.randn(23)]
    grad = torch.randn(*shape[:-1], 23)
    for ours, theirs in zip(results(linear, inputs, grad), results(F.linear, inputs, grad), strict=True):
        assert torch.equal(ours, theirs)


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, bias = torch.randn(5, 37), torch.randn(23, 37), torch.randn(23)
    for which in range(3):
        inputs = [t.clone().requires_grad_(i == which) for i, t in enumerate((x, weight, bias))]
        linear(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == which for i in range(3)]
    assert not linear(x, weight, bias).requires_grad
    with torch.inference_mode():
        assert not linear(x, weight.clone().requires_grad_(), bias).requires_grad


def test_gradients_of_gradients() -> None:
    x, weight, bias = torch.randn(7, 5), torch.randn(3, 5), torch.randn(3)

    def second(product: object) -> tuple[Tensor, ...]:
        inputs = [t.clone().double().float().requires_grad_() for t in (x, weight, bias)]
        out = product(*inputs).pow(3).sum()
        first = torch.autograd.grad(out, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)

    for ours, theirs in zip(second(linear), second(F.linear), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((11, 37), (23, 37), (23,)))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(RuntimeError):
        linear(x, weight.float(), bias)
    assert not seen


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, for forward derivatives
def test_whoever_watches_sees_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    seen = calls(monkeypatch)
    x, weight, bias = torch.randn(11, 37), torch.randn(23, 37), torch.randn(23)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 11 * 37 * 23
    torch.func.jvp(lambda t: linear(t, weight, bias), (x,), (x,))
    torch.func.vmap(lambda t: linear(t, weight, bias))(x)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear(x, weight, bias)
    assert not seen


@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_either_library_may_be_asked_for(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    choose(library, monkeypatch)
    x, weight = torch.randn(11, 37), torch.randn(23, 37)
    assert_no_worse([x, weight, None], torch.randn(11, 23))
    assert bool(seen) == (library == "onednn")
    monkeypatch.setattr(products, "SMALL", 11 * 37 * 23 + 1)
    seen.clear()
    linear(x, weight)
    assert not seen


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("", monkeypatch)
    for seconds, expected in (({F.linear: 2.0}, "onednn"), ({F.linear: 1.0}, "torch"), ({F.linear: 0.5}, "torch")):
        monkeypatch.setattr(products, "_seconds", lambda product, *_, known=seconds: known.get(product, 1.0))
        products.faster.cache_clear()
        assert products.faster() == expected
    choose("mkl", monkeypatch)
    with pytest.raises(ValueError, match="FOVEATE_PRODUCTS=mkl: possible are torch, onednn"):
        products.faster()


def test_the_measurement_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("", monkeypatch)
    state = torch.get_rng_state()
    assert products.faster() in ("torch", "onednn")
    assert torch.equal(torch.get_rng_state(), state)


def test_compiles_whole() -> None:
    weight, bias = torch.randn(23, 37, requires_grad=True), torch.randn(23)
    x = torch.randn(11, 37)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))


def accelerated() -> tuple[nn.Module, object, Tensor]:
    pytest.importorskip("transformers", reason="needs pip install 'foveate[hf]'")
    from tests.support.recurrent_models import VOCABULARY, make

    from foveate.adapt import accelerate

    model = make("qwen3_next")
    return model, accelerate(model), torch.randint(3, VOCABULARY, (2, 19))


@torch.no_grad()
def test_accelerated_models_take_every_linear_map(monkeypatch: pytest.MonkeyPatch) -> None:
    model, acceleration, ids = accelerated()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert acceleration.products == names and "lm_head" in names
    state, seen, hooked = model.state_dict(), calls(monkeypatch), []
    handle = model.lm_head.register_forward_hook(lambda *args: hooked.append(args))
    expected = model(ids).logits
    assert len(seen) > 5 and len(hooked) == 1
    handle.remove()
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    acceleration.undo()
    assert state.keys() == model.state_dict().keys()
    assert not any("forward" in vars(module) for module in model.modules())
    seen.clear()
    assert (model(ids).logits - expected).norm() <= 1e-4 * expected.norm()
    assert not seen
    for parameter in model.parameters():
        parameter.zero_()
    for twin in twins:
        assert (twin(ids).logits - expected).norm() <= 1e-4 * expected.norm()


def test_nothing_is_replaced_where_torchs_own_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("torch", monkeypatch)
    model, acceleration, _ = accelerated()
    assert acceleration.products == [] and len(acceleration.layers) == 1
    assert "forward" not in vars(model.lm_head)


def test_other_modules_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    hooked, replaced = nn.Linear(3, 3), nn.Linear(3, 3)
    hooked._hf_hook, replaced.forward = object(), lambda x: x
    half = nn.Linear(3, 3, dtype=torch.bfloat16)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert products.takes(nn.Linear(3, 3))
    assert not any(map(products.takes, (Other(3, 3), hooked, replaced, half, parametrized, nn.Bilinear(3, 3, 3))))
