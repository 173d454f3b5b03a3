"""The machine a figure was measured on: without it no figure means much."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from foveate.kernels.cpu import processor
from foveate.kernels.cpu.processor import available_cores

VECTOR_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, accelerator, system and versions, ready for JSON.

    >>> sorted(describe())[:4]
    ['accelerator', 'blas', 'cores', 'cpu']
    """
    facts, abilities = processor.facts(), processor.abilities()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "instructions": [name for name in VECTOR_SETS if name in abilities],
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "blas": _blas(),
    }


def in_words(facts: dict[str, Any] | None = None) -> str:
    """One line for a table's caption.

    >>> in_words({"cpu": "Some CPU", "cores": 2, "accelerator": None, "python": "3.11.7", "torch": "2.13.0"})
    'Some CPU, 2 cores, Python 3.11.7, torch 2.13.0'
    """
    facts = describe() if facts is None else facts
    machine = [facts["cpu"], f"{facts['cores']} cores", facts["accelerator"]]
    software = [f"Python {facts['python']}", f"torch {facts['torch']}"]
    return ", ".join(part for part in (*machine, *software) if part)


def _memory_gb() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(size / 1e9, 1)


def _blas() -> str:
    if torch.backends.mkl.is_available():
        return "MKL"
    line = next((line for line in torch.__config__.show().splitlines() if "BLAS_INFO" in line), "")
    return line.partition("BLAS_INFO=")[2].partition(",")[0] or "unknown"
