"""What a PyTorch user would otherwise call on a CPU for a recurrence: transformers, flash-linear-attention, a loop."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.recur_cpu_problem import Function, Problem
from benchmarks.rivals import Rival, Unfit

SHORT = 1024  # tokens


def loop(problem: Problem) -> Function:
    return problem.loop


LOOP = Rival("plain loop", loop)


def _transformers_delta(problem: Problem) -> Function:
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError:
        raise Unfit("transformers with Qwen3-Next is not installed (pip install 'foveate[hf]')") from None
    return _tokens_first(torch_chunk_gated_delta_rule, "g")


TRANSFORMERS_DELTA = Rival("transformers, chunks", _transformers_delta)


def _transformers_scan(problem: Problem) -> Function:
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError:
        raise Unfit("transformers with Mamba is not installed (pip install 'foveate[hf]')") from None
    if problem.training and problem.tensors["x"].shape[1] > SHORT:
        raise Unfit("its backward clears the states of all tokens for each of them, which takes minutes")

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
        x, dt, B, C, z = (t.transpose(1, 2) for t in (x, dt, B, C, z))
        return mamba_selective_scan(x, dt, A, B, C, D, z, delta_bias=dt_bias, delta_softplus=True).transpose(1, 2)

    return run


TRANSFORMERS_SCAN = Rival("transformers, loop", _transformers_scan)


def fla(label: str, folder: str, name: str, gate: str) -> Rival:
    """One of flash-linear-attention's naive functions, its file loaded by path: importing it wants a GPU's compiler."""

    def prepare(problem: Problem) -> Function:
        return _tokens_first(_naive(folder, name), gate)

    return Rival(f"fla, {label}", prepare)


def _naive(folder: str, name: str) -> Function:
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        raise Unfit("it is not installed (pip install 'foveate[peers]')")
    path = Path(package.origin).parent / "ops" / folder / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise Unfit(f"this version has no ops/{folder}/naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise Unfit(f"this version has no {name}")
    return getattr(module, name)


FLA_DELTA = fla("naive chunks", "gated_delta_rule", "naive_chunk_gated_delta_rule", "g")
FLA_SIMPLE = fla("naive chunks", "simple_gla", "naive_chunk_simple_gla", "g")
FLA_GLA = fla("naive loop", "gla", "naive_recurrent_gla", "gk")


def _tokens_first(function: Any, gate: str) -> Function:
    """A function of tensors (B, N, H, D), whose decay goes by the name ``gate``, on ours (B, H, N, D)."""

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, **rest: Tensor) -> Tensor:
        others = {name: x.transpose(1, 2) for name, x in {gate: decay, **rest}.items()}
        out, _ = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **others)
        return out.transpose(1, 2)

    return run
