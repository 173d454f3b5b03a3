"""Patterns from text: the inverse of ``str``."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from operator import and_, or_
from typing import Any

from torch import Tensor

from foveate.patterns.algebra import Pattern

FARTHEST = 2**48  # sums of a few such positions still fit 64 bits
_JOINS = {ast.BitAnd: and_, ast.BitOr: or_}


def parse(text: str, held: Sequence[Tensor] = ()) -> Pattern:
    """The pattern that a text stands for, written as in Python; nothing but patterns is ever evaluated.

    >>> parse("window(512) & causal | sinks(4)")
    window(512) & causal | sinks(4)

    Every pattern is what its text says: ``parse(str(p)) == p``. One that holds tensors prints ``...`` for each;
    they are given beside the text: ``parse(str(p), p.tensors) == p``.

    Raises ValueError, in words, for anything that is not a pattern, and names the nearest known names.
    """
    if not isinstance(text, str):
        raise TypeError(f"parse takes the text of a pattern; got {text!r}")
    try:
        return _pattern(ast.parse(text.strip(), mode="eval").body, iter(held))
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not a pattern: {error.msg} at character {error.offset}") from None
    except (RecursionError, MemoryError):
        raise ValueError("the text of a pattern is nested too deeply to be read") from None


def constructors() -> dict[str, Pattern | Callable[..., Pattern]]:
    """Every public name that is a pattern or makes one."""
    from foveate import patterns

    public = {name: getattr(patterns, name) for name in patterns.__all__}
    return {name: value for name, value in public.items() if isinstance(value, Pattern) or _makes_one(value)}


def _makes_one(value: object) -> bool:
    if not inspect.isfunction(value) or value.__name__ in ("parse", "resolve"):
        return False
    return inspect.signature(value).return_annotation in ("Pattern", Pattern)


def _pattern(node: ast.AST, held: Iterator[Tensor]) -> Pattern:
    if isinstance(node, ast.BinOp) and type(node.op) in _JOINS:
        return _JOINS[type(node.op)](_pattern(node.left, held), _pattern(node.right, held))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_pattern(node.operand, held)
    if isinstance(node, ast.Name):
        return _constant(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node, node.func.id, held)
    raise ValueError(f"a pattern is a name, a call, or patterns joined by &, | and ~; got {_shown(node)}")


def _constant(name: str) -> Pattern:
    value = _known(name)
    if not isinstance(value, Pattern):
        raise ValueError(f"{name} takes arguments: {_usage(name, value)}")
    return value


def _call(node: ast.Call, name: str, held: Iterator[Tensor]) -> Pattern:
    make = _known(name)
    if isinstance(make, Pattern):
        raise ValueError(f"{name} takes no arguments: write {name} alone")
    arguments = [_argument(argument, held) for argument in node.args]
    named = {keyword.arg: _argument(keyword.value, held) for keyword in node.keywords if keyword.arg is not None}
    if len(named) < len(node.keywords):
        raise ValueError(f"arguments are written out one by one; got {_shown(node)}")
    try:
        return make(*arguments, **named)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{_shown(node)} is not as in {_usage(name, make)}: {error}") from None


def _usage(name: str, make: Callable[..., Pattern]) -> str:
    """The call with its parameters and defaults, without types."""
    signature = inspect.signature(make)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=plain, return_annotation=signature.empty)}"


def _known(name: str) -> Pattern | Callable[..., Pattern]:
    known = constructors()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
        raise ValueError(f"there is no pattern {name!r}: {hint}")
    return known[name]


def _argument(node: ast.AST, held: Iterator[Tensor]) -> Any:
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_argument(item, held) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return _within_reach(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _negative(node.operand)
    if isinstance(node, ast.Constant) and node.value is ...:
        return _held(held)
    if isinstance(node, ast.Constant):
        raise ValueError(f"{_shown(node)} cannot be written in a text: only numbers, flags, lists and patterns")
    return _pattern(node, held)


def _within_reach(value: Any) -> Any:
    if isinstance(value, (int, float)) and not -FARTHEST <= value <= FARTHEST:
        raise ValueError(f"numbers in a pattern go up to {FARTHEST:,}, beyond any text; got {value:.3g}")
    return value


def _held(held: Iterator[Tensor]) -> Tensor:
    tensor = next(held, None)
    if tensor is None:
        raise ValueError("a text that says ... holds a tensor: give it beside the text")
    return tensor


def _negative(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return -_within_reach(node.value)
    raise ValueError(f"only a number has a sign; got -{_shown(node)}")


def _shown(node: ast.AST) -> str:
    return repr(ast.unparse(node))
