"""foveate.compat.fla against flash-linear-attention itself: its signatures and its naive functions."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compat_inputs import CASES, FIXED, chosen, draw, states_for

from foveate.compat import fla


def installed() -> Path:
    spec = importlib.util.find_spec("fla")
    if spec is None or spec.origin is None:
        pytest.skip("flash-linear-attention is not installed (pip install 'foveate[peers]')")
    return Path(spec.origin).parent / "ops"


def their_signatures() -> dict[str, ast.arguments]:
    found = {}
    for path in installed().rglob("*.py"):
        if "backends" not in path.parts:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef):
                    found[node.name] = node.args
    return found


def test_every_argument_of_theirs_is_one_of_ours_in_its_place_with_its_default() -> None:
    theirs = their_signatures()
    for name in fla.__all__:
        arguments = theirs.get(name) or theirs[getattr(fla, name).__name__]  # some have a short name too
        names = [argument.arg for argument in arguments.args]
        ours = inspect.signature(getattr(fla, name)).parameters
        if not names:  # deprecated ones that only raise
            continue
        by_place = [x for x, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert by_place == names, name
        defaults = [ast.literal_eval(x) for x in arguments.defaults]
        given = [ours[x].default for x in names[len(names) - len(defaults) :]]
        assert given == defaults, name


def naive(folder: str, file: str = "naive") -> ModuleType:
    """One of their files by its path: importing the package needs triton."""
    path = installed() / folder / f"{file}.py"
    pytest.importorskip("einops", reason="their naive functions need einops")
    if not path.exists():
        pytest.skip(f"this version of flash-linear-attention has no {folder}/{file}.py")
    spec = importlib.util.spec_from_file_location(f"their_{folder.replace('/', '_')}_{file}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ours: their folder, file, function, its arguments, whether heads come before tokens there
NAIVE: list[tuple[str, str, str, str, str, bool]] = [
    ("chunk_gla", "gla", "naive", "naive_recurrent_gla", "q k v gk", False),
    ("chunk_simple_gla", "simple_gla", "naive", "naive_recurrent_simple_gla", "q k v g", False),
    ("chunk_simple_gla", "simple_gla", "naive", "naive_chunk_simple_gla", "q k v g", False),
    ("parallel_simple_gla", "simple_gla", "naive", "naive_parallel_simple_gla", "q k v g", False),
    ("chunk_retention", "retention", "naive", "naive_retention", "q k v", True),
    ("chunk_linear_attn", "linear_attn", "naive", "naive_recurrent_linear_attn", "q k v", False),
    ("chunk_delta_rule", "delta_rule", "naive", "delta_rule_recurrence", "q k v beta", True),
    ("chunk_gated_delta_rule", "gated_delta_rule", "naive", "naive_recurrent_gated_delta_rule", "q k v beta g", False),
    ("chunk_gated_delta_rule", "gated_delta_rule", "naive", "naive_chunk_gated_delta_rule", "q k v g beta", False),
    ("chunk_kda", "kda", "naive", "naive_recurrent_kda", "q k v g:gk beta", False),
    ("chunk_rwkv6", "rwkv6", "recurrent_naive", "naive_recurrent_rwkv6", "q k v w:gk u", True),
    ("chunk_rwkv7", "generalized_delta_rule/dplr", "naive", "dplr_recurrence", "q k v alpha:a beta:b gk", True),
    ("chunk_iplr_delta_rule", "generalized_delta_rule/iplr", "naive", "iplr_recurrence", "q k v alpha:a beta:b", True),
]


@pytest.mark.parametrize(("name", "folder", "file", "function", "words", "heads_first"), NAIVE, ids=lambda x: str(x))
def test_agrees_with_their_own_naive_functions(
    name: str, folder: str, file: str, function: str, words: str, heads_first: bool
) -> None:
    drawn = {key: x.float() for key, x in draw(share=2 if folder == "kda" else 1).items()}
    call = getattr(naive(folder, file), function)
    tensors = {
        key: x.transpose(1, 2).contiguous() if heads_first and x.dim() > 2 else x
        for key, x in chosen(drawn, words).items()
    }
    wants_state = {"initial_state", "output_final_state"} <= set(inspect.signature(call).parameters)
    more = {"initial_state": states_for(drawn, 2).float(), "output_final_state": True} if wants_state else {}
    result = call(
        **tensors, **({"initial_state": more["initial_state"].clone(), "output_final_state": True} if more else {})
    )
    o, state = result if isinstance(result, tuple) else (result, None)
    got, last = getattr(fla, name)(**chosen(drawn, CASES[name][0]), **FIXED.get(name, {}), scale=5**-0.5, **more)
    torch.testing.assert_close(got, o.transpose(1, 2) if heads_first else o, rtol=1e-3, atol=1e-4)
    if wants_state:
        torch.testing.assert_close(last, state, rtol=1e-3, atol=1e-4)


def test_normalized_linear_attention_agrees_with_theirs() -> None:
    call = naive("linear_attn").naive_recurrent_linear_attn
    q, k, v = torch.rand(2, 19, 3, 5), torch.rand(2, 19, 3, 5), torch.randn(2, 19, 3, 7)
    o, (state, z) = call(q, k, v, normalize=True, output_final_state=True)
    got, (last, last_z) = fla.chunk_linear_attn(q, k, v, output_final_state=True)
    torch.testing.assert_close(got, o)
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(last_z, z)


def test_hgrn_agrees_with_theirs() -> None:
    call = naive("hgrn").naive_recurrent_hgrn
    x, g, state = torch.randn(2, 19, 5), -torch.rand(2, 19, 5), torch.randn(2, 5)
    for ours in (fla.chunk_hgrn, fla.fused_recurrent_hgrn):
        for got, wanted in zip(ours(x, g, state, True), call(x, g, state.clone(), True), strict=True):
            torch.testing.assert_close(got, wanted)
