"""The machine a figure was measured on: without it no figure means much."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

VECTOR_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, accelerator, system and versions, ready for JSON.

    >>> sorted(describe())[:4]
    ['accelerator', 'blas', 'cores', 'cpu']
    """
    facts = _cpu_facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "instructions": [name for name in VECTOR_SETS if name in flags],
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


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_facts() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    first = file.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


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
