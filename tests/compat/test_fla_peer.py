"""foveate.compat.fla against flash-linear-attention's own naive functions."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.support.compat_inputs import CASES, FIXED, chosen, draw, states_for

from foveate.compat import fla


def installed() -> Path:
    spec = importlib.util.find_spec("fla")
    if spec is None or spec.origin is None:
        pytest.skip("flash-linear-attention is not installed (pip install 'foveate[dev]')")
    return Path(spec.origin).parent / "ops"


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


# ---- the other recurrences and attentions ----------------------------------------------------------------------


def functions(path: str, *names: str, **given: Any) -> list[Callable[..., Any]]:
    """Functions of a file whose other contents need triton: their definitions alone, with what they call given."""
    einops = pytest.importorskip("einops", reason="their naive functions need einops")
    tree = ast.parse((installed() / path).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "repeat": einops.repeat} | given
    exec(compile(tree, path, "exec"), space)
    return [space[name] for name in names]


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in shapes]


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_forgetting_attention_agrees_with_theirs() -> None:
    q, k, v, g = tensors((2, 19, 4, 5), (2, 19, 2, 5), (2, 19, 2, 7), (2, 19, 4))
    call = naive("forgetting_attn").naive_forgetting_attn
    for window in (None, 6):
        close(fla.parallel_forgetting_attn(q, k, v, -g.abs(), 0.3, window), call(q, k, v, -g.abs(), 0.3, window))


@pytest.mark.parametrize("length", [19, 60])
def test_polynomials_agree_with_theirs(length: int) -> None:
    q, k, v = tensors((2, length, 3, 6), (2, length, 3, 6), (2, length, 3, 7))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    for norm in (True, False):
        wanted = naive("based").naive_parallel_based(*turned, use_norm=norm).transpose(1, 2)
        close(fla.parallel_based(q, k, v, use_norm=norm), wanted)
        close(fla.fused_chunk_based(q, k, v, use_norm=norm), wanted)
        wanted = naive("rebased").naive_parallel_rebased(*turned, use_norm=norm).transpose(1, 2)
        got = fla.parallel_rebased(q, k, v, 1e-6, use_normalize=norm)
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


def test_comba_agrees_with_theirs() -> None:
    drawn = {name: x.float() for name, x in draw().items()}
    q, k, v, g, beta, state = (*(drawn[name] for name in ("q", "k", "v", "g", "beta")), states_for(drawn, 2).float())
    p = k * torch.rand(2, 37, 3, 1)
    wanted = naive("comba").naive_recurrent_comba(q, k, v, p, beta, g, 0.3, state.clone(), True)
    close(fla.chunk_comba(q, k, v, p, g, beta, 0.3, state, True), wanted)
    close(fla.fused_recurrent_comba(q, k, p, v, g, beta, 0.3, state, True), wanted)


def test_gdn2_agrees_with_theirs() -> None:
    drawn = {name: x.float() for name, x in draw().items()}
    q, k, v, g, state = (*(drawn[name] for name in ("q", "k", "v", "gk")), states_for(drawn, 2).float())
    b, w = torch.rand_like(k), torch.rand_like(v)
    wanted = naive("gdn2").naive_recurrent_gdn2(q, k, v, g, b, w, 0.3, state.clone(), True)
    close(fla.chunk_gdn2(q, k, v, g, b, w, 0.3, state, True), wanted)
    close(fla.fused_recurrent_gdn2(q, k, v, g, b, w, scale=0.3, initial_state=state, output_final_state=True), wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_delta_products_agree_with_theirs(packed: bool) -> None:
    long = {name: x.float() for name, x in draw(length=40).items()}
    q, g, count = long["q"][:, :20], long["g"][:, :20], 3 if packed else 2
    parts = [q, long["k"], long["v"], g, long["beta"]]
    parts = [x[:1] for x in parts] if packed else parts
    state = states_for(long, count).float()
    offsets = torch.tensor([0, 7, 11, 20]) if packed else None
    call = naive("gated_delta_product").naive_recurrent_gated_delta_product
    wanted = call(*parts, 0.3, offsets, state.clone(), True, 2)
    close(fla.chunk_gated_delta_product(*parts, 2, 0.3, state, True, cu_seqlens=offsets), wanted)


def test_gates_agree_with_theirs() -> None:
    gate, bounded = functions("kda/gate.py", "naive_kda_gate", "naive_kda_lowerbound_gate")
    raw, A_log, bias = tensors((2, 7, 3, 5), (3,), (15,))
    close(fla.fused_kda_gate(raw, A_log, bias), gate(raw, A_log, bias))
    close(fla.fused_kda_gate(raw, A_log, bias, -4.0), bounded(raw, A_log, bias, -4.0))
    (gate,) = functions("gated_delta_rule/gate.py", "naive_gdn_gate")
    close(fla.fused_gdn_gate(raw[..., 0], A_log, bias[:3]), gate(raw[..., 0], A_log, bias[:3]))


def mean_pooling(x: torch.Tensor, block: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    lengths = [x.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    return torch.stack([part.mean(1) for piece in x.split(lengths, 1) for part in piece.split(block, 1)], 1)


def chunk_offsets(cu_seqlens: torch.Tensor, block: int) -> torch.Tensor:
    return torch.tensor([0, *(math.ceil(n / block) for n in cu_seqlens.diff().tolist())]).cumsum(0)


@pytest.mark.parametrize("packed", [False, True])
def test_nsa_agrees_with_theirs(packed: bool) -> None:
    names = "naive_nsa_selection", "naive_nsa_compression", "naive_nsa_topk", "naive_nsa"
    given = {"mean_pooling": mean_pooling, "prepare_chunk_offsets": chunk_offsets}
    call = functions("nsa/naive.py", *names, **given)[-1]
    batch, heads = 1 if packed else 2, 32
    q, k, v = tensors((batch, 30, heads, 5), (batch, 30, 2, 5), (batch, 30, 2, 5))
    g_cmp, g_slc = torch.rand(2, batch, 30, heads)
    options = {"block_counts": 4, "block_size": 4, "cu_seqlens": torch.tensor([0, 9, 30]) if packed else None}
    o, chosen = call(q, k, v, g_cmp, g_slc, **options, return_block_indices=True)
    got, ours = fla.naive_nsa(q, k, v, g_cmp, g_slc, **options, return_block_indices=True)
    assert torch.equal(ours.sort(-1).values, chosen.sort(-1).values)
    close(got, o)
    assert torch.equal(got, fla.parallel_nsa(q, k, v, g_cmp, g_slc, **options))
