"""attend: any call against dense attention; its gradients; parts and their union; decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.patterns import Scene
from foveate.patterns.placed import split
from fuzz import trees
from fuzz.cases import Refused, kind
from fuzz.dense import Dense, mask_of
from fuzz.draw import DTYPES, Draw, repeated, shape_of
from fuzz.judge import Judge, demand
from fuzz.settings import anything

PAIRS = 16_000  # of queries and keys over all heads; more in one case of a hundred
WIDE = 0.08  # share of cases in which queries choose among whole tiles of keys
NAN, INF = float("nan"), float("inf")


@dataclass
class Problem:
    """A call: tensors as the library gets them, clean copies for the definition, and the definition."""

    q: Tensor
    k: Tensor
    v: Tensor
    clean: list[Tensor]
    pattern: fv.Pattern
    dense: Dense
    layout: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    parameters: list[Tensor] = field(default_factory=list)  # of bias and weights, as the library holds them

    def __str__(self) -> str:
        tensors = f"q {shape_of(self.q)}, k {shape_of(self.k)}, v {shape_of(self.v)}"
        options = {name: shape_of(value) for name, value in self.options.items()}
        return f"attend({tensors}, {self.pattern}, layout={self.layout}, {options}), {self.dense.bias} bias"


def problem(draw: Draw, n: int, m: int, *, plain: bool = False, finite: bool = False, exact: bool = False) -> Problem:
    """A call of about n queries and m keys; an exact one has float64 tensors only."""
    dtype, contents = torch.float64 if exact else draw.one(DTYPES), draw.contents()
    wide = not plain and draw.chance(WIDE)
    n, m, layout = (n, m, None) if plain else trees.layout(draw, n, m)
    if wide:
        n, m, layout = draw.whole(65, 200), draw.whole(129, 260), None
    heads = draw.one((1, 1, 2, 2, 3, 4, 6))
    batch = draw.batch()
    most = PAIRS if draw.chance(0.99) and not wide else 16 * PAIRS
    while batch * heads * n * m > most:
        batch, heads = max(1, batch - 1), max(1, heads // 2)
        if batch == heads == 1:
            break
    groups, value_groups = draw.divisor(heads), draw.divisor(heads)
    value_groups = groups if draw.chance(0.8) else value_groups
    dim = draw.dim()
    value_dim = dim if draw.chance(0.7) else draw.dim()
    q = draw.tensor(batch, heads, n, dim, dtype=dtype, contents=contents)
    # Of two constants all products are equal, and their roundings add up instead of cancelling.
    k = draw.tensor(batch, groups, m, dim, dtype=dtype, contents="normal" if contents == "constant" else contents)
    v = draw.tensor(
        batch, value_groups, m, value_dim, dtype=dtype, contents="normal" if contents == "large" else contents
    )
    scale = draw.one((None, None, None, 0.3, 1.0))
    place = trees.Place(batch, heads, groups, n, m, layout)
    pattern = band(draw) if plain else trees.of_whole_tiles(draw) if wide else tree(draw, place)
    decays = not plain and draw.chance(0.06) and may_decay(pattern, layout, n, m)
    pattern = pattern & fv.causal if decays else pattern
    factor = dim**-0.5 if scale is None else scale
    mask = mask_of(pattern, Scene(n, m, layout or fv.Sequence(), q, k, factor))
    mask = mask.repeat_interleave(heads // mask.shape[1], 1) if mask.shape[1] > 1 else mask
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    if layout is not None:
        options["layout"] = layout
    found = Problem(q, k, v, [q, k, v], pattern, Dense(mask, factor), layout, options)
    if not plain:
        _extras(draw, found, dtype, decays=decays, exact=exact)
    _poison(draw, found, finite)
    _place(draw, found)
    return found


def tree(draw: Draw, place: trees.Place) -> fv.Pattern:
    try:
        return trees.pattern(draw, place)
    except ValueError as reason:
        raise Refused(str(reason)) from None


def band(draw: Draw) -> fv.Pattern:
    left = draw.one((1, 3, 8, 63, 64, 200))
    return draw.one((fv.full, fv.causal, fv.causal, fv.window(left) & fv.causal, fv.window(left, draw.whole(0, 9))))


def may_decay(pattern: fv.Pattern, layout: Any, n: int, m: int) -> bool:
    """Whether queries are among the keys, and no padding lies between tokens of one text."""
    place = None if layout is not None and layout.num_axes else split(pattern, layout or fv.Sequence(), m)[1]
    return 0 < n <= m and (place is None or place.keeps_distances)


def _extras(draw: Draw, problem: Problem, dtype: torch.dtype, *, decays: bool, exact: bool) -> None:
    """Soft-cap, bias and weights."""
    dense, heads = problem.dense, problem.q.shape[1]
    if draw.chance(0.15):
        dense.softcap = problem.options["softcap"] = draw.one((0.5, 5.0, 30.0))
    dense.bias = "decay" if decays else draw.one(("none",) * 6 + ("dense", "dense", "alibi", "table"))
    wide = dtype if exact or draw.chance(0.7) else torch.float32
    if dense.bias != "none":
        parameter, bias = _bias(draw, problem, wide)
        if dense.bias in ("alibi", "table") and not dense.dims:
            _keep_distances(problem)
        problem.options["bias"] = bias
        problem.parameters.append(parameter)
    dense.weights = draw.one(("softmax",) * 6 + ("sink", "sigmoid", "relu"))
    if dense.weights != "softmax":
        parameter = draw.tensor(draw.one((1, heads)), dtype=wide)
        make = {"sink": lambda x: fv.softmax(sink=x), "sigmoid": lambda x: fv.sigmoid(bias=x)}
        problem.options["weights"] = make.get(dense.weights, lambda x: fv.relu(bias=x))(parameter)
        problem.parameters.append(parameter)
    problem.clean += [x.clone() for x in problem.parameters]


def _keep_distances(problem: Problem) -> None:
    """Where padding lies between tokens of one text, distances are those in the text, and padding sees nothing."""
    layout, (n, m) = problem.layout or fv.Sequence(), (problem.q.shape[2], problem.k.shape[2])
    place = split(problem.pattern, layout, m)[1] if problem.q.shape[0] and not layout.num_axes else None
    if place is None or place.keeps_distances or not m:
        return
    slot = torch.arange(m - n, m)
    real = place.document[:, slot.clamp_min(0)] >= 0
    problem.dense.positions = place.position
    problem.dense.mask = problem.dense.mask & (real & (slot >= 0)).unsqueeze(1).unsqueeze(3)


def _bias(draw: Draw, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Any]:
    dense, (batch, heads, n, _), m = problem.dense, problem.q.shape, problem.k.shape[2]
    if dense.bias == "dense":
        shape = [size if draw.chance(0.7) else 1 for size in (batch, heads, n, m)]
        parameter = draw.placed(draw.tensor(*shape, dtype=dtype))
        if draw.chance(0.2):
            parameter.masked_fill_(draw.bits(0.3, *shape), -INF)
        return parameter, parameter
    if dense.bias == "decay":
        rows = draw.one((1, batch)) or 1, draw.one((1, heads))
        parameter = draw.placed(draw.uniform(*rows, m).mul(-draw.one((0.01, 1.0, 5.0))).to(dtype))
        return parameter, fv.log_decay(parameter)
    if dense.bias == "alibi":
        parameter = draw.tensor(heads, dtype=dtype)
        return parameter, fv.alibi(parameter)
    if isinstance(problem.layout, fv.Grid) and draw.chance(0.7):
        dense.dims = problem.layout.dims
    axes = len(dense.dims) if len(dense.dims) > 1 else 1
    dense.dims = dense.dims if axes > 1 else ()
    parameter = draw.tensor(heads, *(2 * draw.whole(0, 9) + 1 for _ in range(axes)), dtype=dtype)
    return parameter, fv.relative_table(parameter, dims=dense.dims or None)


def _poison(draw: Draw, problem: Problem, finite: bool) -> None:
    """Put NaN where no query looks; sometimes where one does."""
    kind = draw.one(("none",) * 5 + ("unseen", "unseen", "seen"))
    q, k, v = problem.q, problem.k, problem.v
    if kind == "none" or not (q.numel() and k.numel()) or (kind == "seen" and finite):
        return
    bad = draw.one((NAN, INF, -INF))
    if kind == "seen":
        x = draw.one([v, v, v] if problem.pattern.is_dynamic else [q, k, v])
        x.masked_fill_(draw.bits(draw.one((0.01, 0.2)), *x.shape), bad)
        return
    mask = problem.dense.mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    seen = mask.any(2)  # (B, H, M)
    problem.v = v.masked_fill(~seen.unflatten(1, (v.shape[1], -1)).any(2).unsqueeze(-1), bad)
    if not problem.pattern.is_dynamic:
        problem.k = k.masked_fill(~seen.unflatten(1, (k.shape[1], -1)).any(2).unsqueeze(-1), bad)
        if problem.dense.weights == "softmax":
            problem.q = q.masked_fill(~mask.any(3).unsqueeze(-1), bad)


def _place(draw: Draw, problem: Problem) -> None:
    if draw.chance(0.05):  # one key and value for the whole batch, or for all heads
        for number, name in enumerate("qkv"):
            x = repeated(draw, getattr(problem, name))
            if name == "v" and not torch.equal(problem.clean[2], problem.v):
                continue
            if name == "v":
                problem.v = x
                problem.clean[number] = x
    problem.q, problem.k, problem.v = (draw.placed(x) for x in (problem.q, problem.k, problem.v))


def implementation(draw: Draw, problem: Problem) -> str:
    wanted = "auto" if draw.chance(0.85) else draw.one(("native", "tiles", "sdpa", "reference"))
    finite = all(bool(x.isfinite().all()) for x in (problem.q, problem.k, problem.v))
    # torch's own products in bfloat16 spread NaN to the next row (oneDNN with AMX, odd inner sizes).
    return wanted if finite or problem.q.dtype != torch.bfloat16 else "auto"


def lengths(draw: Draw) -> tuple[int, int]:
    n = draw.length()
    return n, n if draw.chance(0.6) else draw.length()


@kind("attend", 24)
def forward(draw: Draw) -> None:
    found = problem(draw, *lengths(draw))
    impl = implementation(draw, found)
    out = called(draw, found, impl)
    judge(found)(["out"], [out])


def called(draw: Draw, found: Problem, impl: str) -> Tensor:
    held = [x.clone() for x in (found.q, found.k, found.v)] if draw.chance(0.1) else []
    try:
        with torch.no_grad(), anything(draw):
            out = fv.attend(found.q, found.k, found.v, found.pattern, impl=impl, **found.options)
    except NotImplementedError as reason:
        if impl == "auto" and "Points" not in str(reason):  # which no traced operator takes
            raise
        raise Refused(str(reason)) from None
    demand(out.dtype == found.q.dtype, f"out is {out.dtype}, q {found.q.dtype}")
    demand(out.device == found.q.device, f"out is on {out.device}")
    for name, before, after in zip("qkv", held, (found.q, found.k, found.v), strict=False):
        demand(torch.equal(before.nan_to_num(), after.nan_to_num()), f"the call writes to {name}")
    return out


def judge(found: Problem) -> Judge:
    def first(*tensors: Tensor) -> tuple[Tensor, ...]:
        return found.dense(*tensors)[:1]

    def sizes(*tensors: Tensor) -> tuple[Tensor, ...]:
        return found.dense.sizes(*tensors)[:1]

    def in_order(*tensors: Tensor) -> tuple[Tensor, ...]:
        return replace(found.dense, in_order=True)(*tensors)[:1]

    return Judge(first, found.clean, found.q.dtype, sizes, in_order, spoiled=spoiled(found))


def spoiled(found: Problem) -> Tensor | None:
    """Rows (B, H, N) that see a number which is not finite."""
    q, k, v = found.clean[:3]
    bad = [~x.isfinite().all(-1) for x in (q, k, v)]
    if not any(bool(x.any()) for x in bad):
        return None
    keys = sum(x.repeat_interleave(q.shape[1] // x.shape[1], 1).float() for x in bad[1:])
    assert isinstance(keys, Tensor)
    return bad[0] | ((found.dense.mask.float() @ keys.unsqueeze(-1)).squeeze(-1) > 0)


@kind("decode", 12)
def decode(draw: Draw) -> None:
    """A few queries against the keys of a cache."""
    m = draw.length() if draw.chance(0.9) else draw.whole(200, 900)
    found = problem(draw, min(draw.one((1, 1, 1, 2, 3, 4, 5, 8, 13, 16)), max(1, m)), m, plain=draw.chance(0.6))
    if found.k.shape[2] and draw.chance(0.3):
        found.k, found.v = (torch.cat([x, torch.full_like(x[:, :, :1], NAN)], 2)[:, :, :-1] for x in (found.k, found.v))
    judge(found)(["out"], [called(draw, found, implementation(draw, found))])


@kind("attend_partial", 6)
def with_lse(draw: Draw) -> None:
    """Out and lse of a call; and parts of the keys, merged."""
    found = problem(draw, *lengths(draw))
    options = dict(found.options)
    try:
        with torch.no_grad(), anything(draw):
            whole = fv.attend_partial(found.q, found.k, found.v, found.pattern, **options)
    except NotImplementedError as reason:
        if "Points" not in str(reason):
            raise
        raise Refused(str(reason)) from None
    in_order = replace(found.dense, in_order=True)
    both = Judge(found.dense, found.clean, found.q.dtype, found.dense.sizes, in_order, spoiled=spoiled(found))
    if whole.lse is None:
        both(["out"], [whole.out])
        return
    both(["out", "lse"], [whole.out, whole.lse])


@kind("merge", 4)
def merged(draw: Draw) -> None:
    n, m = lengths(draw)
    found = problem(draw, n, m, plain=True, finite=True)
    found.pattern = fv.full
    heads, m = found.q.shape[1], found.k.shape[2]
    mask = draw.bits(draw.one((0.1, 0.6, 1.0)), found.q.shape[0], draw.one((1, heads)), m)
    found.dense.mask = mask.unsqueeze(2).expand(-1, -1, found.q.shape[2], -1)
    q, k, v = found.clean
    pieces = draw.split(m, 4)
    parts, first = [], 0
    with torch.no_grad(), anything(draw):
        for length in pieces:
            span = slice(first, first + length)
            pattern = fv.key_padding(mask[:, :, span])
            parts.append(fv.attend_partial(q, k[:, :, span], v[:, :, span], pattern, scale=found.dense.scale))
            first += length
        union = fv.merge(parts)
    assert union.lse is not None

    def sizes(*tensors: Tensor) -> tuple[Tensor, ...]:  # weights are as exact as lse, which is as great as logits
        out, lse = found.dense.sizes(*tensors)
        return out * lse.nan_to_num(1, 1, 1).unsqueeze(-1), lse

    Judge(found.dense, found.clean, q.dtype, sizes, ulps=8)(["merged out", "lse"], [union.out, union.lse])


@kind("attend_backward", 10)
def backward(draw: Draw) -> None:
    """Gradients of q, k, v and of what bias and weights hold."""
    n, m = lengths(draw)
    found = problem(draw, min(n, 130), min(m, 130), finite=True)
    names = names_of(found)
    grad = draw.tensor(*found.q.shape[:3], found.v.shape[3], dtype=found.q.dtype)
    leaves = [found.q, found.k, found.v, *found.parameters]
    leaves = [x.detach().requires_grad_() for x in leaves]
    options = rebuilt(found, leaves[3:])
    impl = "auto" if draw.chance(0.9) else draw.one(("native", "tiles", "reference"))
    try:
        with anything(draw):
            out = fv.attend(leaves[0], leaves[1], leaves[2], found.pattern, impl=impl, **options)
            grads = torch.autograd.grad(out, leaves, draw.placed(grad), allow_unused=True, materialize_grads=True)
    except NotImplementedError as reason:
        if impl == "auto" and "Points" not in str(reason):
            raise
        raise Refused(str(reason)) from None
    for name, leaf, got in zip(names, leaves, grads, strict=True):
        demand(got.dtype == leaf.dtype, f"the gradient of {name} is {got.dtype}, not {leaf.dtype}")
    in_order = replace(found.dense, in_order=True)
    judged = Judge(
        lambda *x: gradients(found.dense, *x),
        [*found.clean, grad],
        found.q.dtype,
        lambda *x: bounds(found.dense, *x),
        lambda *x: gradients(in_order, *x),
    )
    judged(["out", *(f"gradient of {name}" for name in names)], [out, *grads])


@kind("attend_twice", 2)
def twice(draw: Draw) -> None:
    """Gradients of gradients, in float64: they sum up what cancels."""
    n, m = lengths(draw)
    found = problem(draw, min(n, 33), min(m, 33), finite=True, exact=True)
    shape = (*found.q.shape[:3], found.v.shape[3])
    grad = draw.tensor(*shape, dtype=found.q.dtype)
    along = [draw.tensor(*x.shape, dtype=x.dtype) for x in found.clean]
    leaves = [x.detach().requires_grad_() for x in (found.q, found.k, found.v, *found.parameters)]
    options = rebuilt(found, leaves[3:])
    try:
        with anything(draw):
            out = fv.attend(leaves[0], leaves[1], leaves[2], found.pattern, **options)
            seconds = second(out, leaves, grad, along)
    except NotImplementedError as reason:
        if "Points" not in str(reason):
            raise
        raise Refused(str(reason)) from None

    def definition(*tensors: Tensor) -> list[Tensor]:
        inputs, (pull, *ways) = tensors[: len(leaves)], tensors[len(leaves) :]
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        out = found.dense(*inputs)[0] + 0 * sum(x.sum() for x in inputs if not x.numel())
        return second(out, inputs, pull, ways)

    def sizes(*tensors: Tensor) -> list[Tensor]:  # what adds up to nothing in one is of the size of others
        found = definition(*tensors)
        most = max([1.0, *(float(x.abs().max()) for x in found if x.numel())])
        return [torch.full_like(x, most) for x in found]

    judged = Judge(definition, [*found.clean, grad, *along], found.q.dtype, sizes)
    judged([f"second gradient of {name}" for name in names_of(found)], seconds)


def second(out: Tensor, leaves: Sequence[Tensor], grad: Tensor, along: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of: gradients of ``out`` by the leaves, each times a tensor, all summed."""
    every = {"allow_unused": True, "materialize_grads": True}
    firsts = torch.autograd.grad(out, leaves, grad, create_graph=True, **every)  # type: ignore[call-overload]
    total = sum((first * way).sum() for first, way in zip(firsts, along, strict=True))
    if not (isinstance(total, Tensor) and total.requires_grad):
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(total, leaves, **every))  # type: ignore[call-overload]


def names_of(found: Problem) -> list[str]:
    """Of the tensors that have gradients."""
    more = [("bias", found.dense.bias != "none"), ("weights", found.dense.weights != "softmax")]
    return ["q", "k", "v", *(name for name, given in more if given)]


def rebuilt(found: Problem, parameters: list[Tensor]) -> dict[str, Any]:
    """The options with other tensors in bias and weights."""
    options, left = dict(found.options), list(parameters)
    if found.dense.bias != "none":
        new = left.pop(0)
        bias = {"dense": lambda: new, "alibi": lambda: fv.alibi(new), "decay": lambda: fv.log_decay(new)}
        options["bias"] = bias.get(found.dense.bias, lambda: fv.relative_table(new, dims=found.dense.dims or None))()
    if found.dense.weights == "sink":
        options["weights"] = fv.softmax(sink=left.pop(0))
    elif found.dense.weights != "softmax":
        options["weights"] = getattr(fv, found.dense.weights)(bias=left.pop(0))
    return options


def gradients(dense: Dense, *tensors: Tensor) -> list[Tensor]:
    """Out, and the gradient of every tensor but the last, which is that of out."""
    *inputs, grad = (x.detach().requires_grad_() for x in tensors)
    out = dense(*inputs)[0] + 0 * sum(x.sum() for x in inputs if not x.numel())  # part of the graph without keys
    found = torch.autograd.grad(out, inputs, grad.detach(), allow_unused=True, materialize_grads=True)
    return [out, *found]


def bounds(dense: Dense, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> list[Tensor]:
    """The sizes of what gradients add up: every product without its sign."""
    *parameters, grad = more
    heads, key_heads, value_heads = q.shape[1], k.shape[1], v.shape[1]
    out = dense(q, k, v.abs(), *parameters)[0]
    ones = torch.ones_like(v[..., :1])
    mask, scale = dense.mask, dense.scale
    values, keys = (x.abs().repeat_interleave(heads // x.shape[1], 1) for x in (v, k))
    weights = _weights_of(dense, q, k, ones, *parameters)
    pull = weights * (grad.abs() @ values.mT + (grad.abs() * out).sum(-1, keepdim=True))
    pull = torch.where(mask, pull, 0)
    dq = scale * pull @ keys
    dk = (scale * pull.mT @ q.abs()).unflatten(1, (key_heads, -1)).sum(2)
    dv = (weights.mT @ grad.abs()).unflatten(1, (value_heads, -1)).sum(2)
    rest = [x.new_full(x.shape, float(pull.sum()) * _reach(dense, k.shape[2])) for x in parameters]
    return [out, dq, dk, dv, *rest]


def _reach(dense: Dense, num_keys: int) -> float:
    return float(max(1, num_keys)) if dense.bias == "alibi" else 1.0


def _weights_of(dense: Dense, q: Tensor, k: Tensor, ones: Tensor, *parameters: Tensor) -> Tensor:
    """The weights themselves, read off with unit values."""
    identity = torch.eye(k.shape[2], dtype=q.dtype).expand(q.shape[0], 1, -1, -1)
    assert ones.shape[2] == k.shape[2]
    weights = dense(q, k, identity, *parameters)[0]
    return torch.ones_like(weights) if dense.weights == "relu" else weights
