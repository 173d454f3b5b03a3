"""attend over selections as an operator of torch's dispatcher, so that torch.compile takes it whole.

A graph holds tensors and text: the pattern travels as what it prints, and is read back inside the operator.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from foveate import autodiff, patterns
from foveate.attention import bias as biases_by_name
from foveate.attention.bias import Bias, LogDecay, RelativeTable
from foveate.attention.call import Call
from foveate.attention.dropout import Dropout
from foveate.attention.gaps import Positioned, gaps_in, place_biases, placed_at
from foveate.attention.impl import documents
from foveate.attention.impl.definition import definition
from foveate.attention.impl.plan import ByDocument, Kernels, Plan
from foveate.attention.partial import Partial, lse_dtype, sums_dtype
from foveate.layouts.kinds import Layout, Points
from foveate.patterns.algebra import Pattern, Scene, resolve
from foveate.patterns.parse import parse
from foveate.patterns.select.dense import dense_mask

KERNELS: dict[str, Kernels] = {}  # by which name a graph knows them; each implementation enters its own


def attend_selected(call: Call, kernels: str) -> Partial:
    """Run a call by the operator; what `foveate.attention.impl.selected` does inside torch.compile."""
    _check_layout(call.layout)
    text = "\n".join((kernels, call.kind, str(call.pattern), str(call.layout), *(_bias_text(b) for b in call.biases)))
    parameters = [bias.parameter for bias in call.biases]
    softcap = 0.0 if call.softcap is None else call.softcap
    p, seed = (call.dropout.p, call.dropout.numbers) if call.dropout else (0.0, None)
    held = list(call.pattern.tensors)
    out, lse = _attend(call.q, call.k, call.v, parameters, held, text, call.scale, softcap, p, seed)
    return Partial(out, lse.to(lse_dtype(call.q)) if call.kind == "softmax" else None)


def visible(call: Call) -> Tensor:
    """The dense mask of a call's pattern, (batches, heads, N, M), as an operator.

    Index arithmetic must not be traced: inductor folds it into integers of any size, which do not wrap.
    """
    _check_layout(call.layout)
    pattern, text = call.pattern, "\n".join((str(call.pattern), str(call.layout)))
    batches, heads = (call.batch, call.heads) if pattern.is_dynamic else (pattern.batches, pattern.heads)
    return _visible(call.q, call.k, list(pattern.tensors), text, call.scale, batches, heads)


def positioned(call: Call) -> tuple[Call, Tensor]:
    """The call with biases told where tokens stand, and which queries (B, 1, N, 1) are tokens.

    What :func:`foveate.attention.gaps.place_biases` does where it may look at what masks hold.
    """
    _check_layout(call.layout)
    text = "\n".join((str(call.pattern), str(call.layout), *(_bias_text(bias) for bias in call.biases)))
    position = _positions(call.k, list(call.pattern.tensors), text)
    offset = call.num_keys - call.num_queries
    ahead = max(-offset, 0)  # queries before the first key
    tokens = torch.nn.functional.pad(position[:, max(offset, 0) :] >= 0, (ahead, 0), value=True)
    biases = tuple(placed_at(bias, position, offset) for bias in call.biases)
    return replace(call, biases=biases), tokens[:, None, :, None]


@lru_cache(maxsize=256)
def _reads_back(pattern: Pattern, layout: Layout) -> bool:
    try:
        return parse(str(pattern), pattern.tensors) == pattern and _layout(str(layout)) == layout
    except (ValueError, TypeError, AttributeError, SyntaxError):
        return False


def travels(call: Call) -> bool:
    """Whether the pattern and layout of a call can be told in text, by which operators name them."""
    return not isinstance(call.layout, Points) and _reads_back(call.pattern, call.layout)


def _check_layout(layout: Layout) -> None:
    if isinstance(layout, Points):
        raise NotImplementedError(
            "a Points layout cannot be traced by torch.compile, nor serve tensors that are not plain (fake, subclasses,"
            " views that negate): attend on plain tensors, outside of what traces"
        )


def _bias_text(bias: Bias) -> str:
    shape = f" {list(bias.dims)} {list(bias.reach)}" if isinstance(bias, RelativeTable) else ""
    return type(bias).__name__ + shape


@lru_cache(maxsize=256)
def _layout(text: str) -> Layout:
    return _made(ast.parse(text, mode="eval").body)


def _made(node: ast.AST) -> Any:
    """A layout, or what it is made of."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    assert isinstance(node.func, ast.Name)
    settings = {str(setting.arg): _made(setting.value) for setting in node.keywords}
    return getattr(patterns, node.func.id)(*map(_made, node.args), **settings)


def _bias(text: str, parameter: Tensor, offset: int) -> Bias:
    name, *shape = text.split(" ", 1)
    kind = getattr(biases_by_name, name)
    if name == "RelativeTable":
        dims, reach = ast.literal_eval(shape[0].replace("] [", "], ["))
        return kind(parameter, tuple(dims), tuple(reach), offset)
    return kind(parameter, offset) if name in ("Alibi", "LogDecay") else kind(parameter)


def _plan(
    q: Tensor,
    k: Tensor,
    parameters: list[Tensor],
    held: list[Tensor],
    text: str,
    scale: float,
    softcap: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Kernels, Plan]:
    name, kind, pattern, layout, *bias_texts = text.split("\n")
    offset = k.shape[2] - q.shape[2]
    kernels = KERNELS[name]
    biases = tuple(_bias(t, p, offset) for t, p in zip(bias_texts, parameters, strict=True))
    dropout = None if seed is None else Dropout.of(p, seed)
    whole, where = parse(pattern, held), _layout(layout)
    biases, whole = place_biases(biases, whole, where, q.shape[2], k.shape[2])
    how = q, k, whole, where, biases, kind, scale, softcap or None, dropout
    plan = documents.plan(kernels, *how)  # type: ignore[arg-type]
    if any(isinstance(bias, Positioned) for bias in biases) and not isinstance(plan.selected, ByDocument):
        kernels = KERNELS["tiles"]  # which reads any bias
        plan = documents.plan(kernels, *how)  # type: ignore[arg-type]
    return kernels, plan


@torch.library.custom_op("foveate::attend_selected", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    held: list[Tensor],
    text: str,
    scale: float,
    softcap: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kernels, plan = _plan(q, k, parameters, held, text, scale, softcap, p, seed)
    return documents.forward(kernels, plan, q, k, v)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=sums_dtype(q))


@torch.library.custom_op("foveate::attend_selected_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    parameters: list[Tensor],
    held: list[Tensor],
    text: str,
    scale: float,
    softcap: float,
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    kernels, plan = _plan(q, k, parameters, held, text, scale, softcap, p, seed)
    return list(documents.backward(kernels, plan, q, k, v, out, lse, grad_out, grad_lse))


@_attend_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    parameters: list[Tensor],
    *_rest: Any,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *parameters)]


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad_out, grad_lse, q, k, v, _, _, parameters, held, *ctx.rest, seed = inputs
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(grad_out, grad_lse, seed, q, k, v, *parameters, *held)


def _second_backward(ctx: Any, wanted: list[Tensor | None]) -> tuple[Any, ...]:
    grad_out, grad_lse, seed, *others = ctx.saved_tensors
    inputs, held = others[: 3 + ctx.num_parameters], others[3 + ctx.num_parameters :]
    text, scale, softcap, p = ctx.rest
    _, plan = _plan(inputs[0], inputs[1], inputs[3:], held, text, scale, softcap, p, seed)
    of_grads, of_inputs = autodiff.second_gradients(
        partial(definition, plan), inputs, [grad_out, grad_lse], wanted, create_graph=torch.is_grad_enabled()
    )
    return (*of_grads, *of_inputs[:3], None, None, of_inputs[3:], [None] * len(held), *([None] * 5))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, parameters, held, *ctx.rest, seed = inputs
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(q, k, v, *output, seed, *parameters, *held)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, seed, *others = ctx.saved_tensors
    parameters, held = others[: ctx.num_parameters], others[ctx.num_parameters :]
    grads = _attend_backward(grad_out, grad_lse, q, k, v, out, lse, parameters, held, *ctx.rest, seed)
    return (*grads[:3], grads[3:], [None] * len(held), None, None, None, None, None)


def _mask(q: Tensor, k: Tensor, held: list[Tensor], text: str, scale: float, batches: int, heads: int) -> Tensor:
    pattern, layout = text.split("\n")
    scene = Scene(q.shape[2], k.shape[2], _layout(layout), q.detach(), k.detach(), scale)
    mask = dense_mask(resolve(parse(pattern, held), scene), scene, q.device)
    return mask.repeat_interleave(heads // mask.shape[1], dim=1).expand(batches, -1, -1, -1).contiguous()


def _fake_mask(q: Tensor, k: Tensor, held: list[Tensor], text: str, scale: float, batches: int, heads: int) -> Tensor:
    return q.new_empty(batches, heads, q.shape[2], k.shape[2], dtype=torch.bool)


def _position(k: Tensor, held: list[Tensor], text: str) -> Tensor:
    pattern, layout, *biases = text.split("\n")
    place = gaps_in(parse(pattern, held), _layout(layout), k.shape[2], decays=LogDecay.__name__ in biases)
    position = torch.arange(k.shape[2], device=k.device) if place is None else place.position.to(k.device)
    return position.expand(k.shape[0], -1).clone(memory_format=torch.contiguous_format)


def _fake_position(k: Tensor, held: list[Tensor], text: str) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2], dtype=torch.int64)


_positions = autodiff.choice("positions(Tensor k, Tensor[] held, str text) -> Tensor", _position, _fake_position)
_visible = autodiff.choice(
    "visible(Tensor q, Tensor k, Tensor[] held, str text, float scale, int batches, int heads) -> Tensor",
    _mask,
    _fake_mask,
)


_attend.register_autograd(_backward, setup_context=_setup)
_attend_backward.register_autograd(_second_backward, setup_context=_setup_backward)
_attend_backward.register_vmap(partial(autodiff.looped, _attend_backward))


@_attend.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    """Queries, keys and values as more entries of the batch, where nothing else tells entries apart."""
    tensors, (parameters, held, text, *rest) = inputs[:3], inputs[3:]
    dropped = rest[-1] is not None  # by the number of the batch entry
    mapped = any(dim is not None for dims in in_dims[3:5] for dim in dims or ())
    if dropped or mapped or not _shared_by_entries(parameters, held, text):
        return autodiff.looped(_attend, info, in_dims, *inputs)
    size = info.batch_size
    spread = (
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=False)
    )
    out, lse = _attend(*(x.flatten(0, 1) for x in spread), parameters, held, text, *rest)
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


def _shared_by_entries(parameters: list[Tensor], held: list[Tensor], text: str) -> bool:
    """Whether neither the pattern nor a bias tells entries of the batch apart."""
    alike = all(x.dim() < 3 or x.shape[0] == 1 for x in parameters)  # (B, H, M) log decays and (B, H, N, M)
    return alike and parse(text.split("\n")[2], held).batches == 1
