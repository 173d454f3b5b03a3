"""What this processor can run."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

from foveate.kernels.cpu.variants import BY_NAME, VARIANTS, Family, Variant

FAMILIES: dict[str, Family] = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}
# What PyTorch says of a processor where there is no /proc/cpuinfo, and the variants that this vouches for.
TORCH_VOUCHES = {"AVX2": ("avx2",), "AVX512": ("avx2", "avx512")}
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def facts(file: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none.

    >>> all(name.strip() == name for name in facts())
    True
    """
    if not file.exists():
        return {}
    first = file.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def abilities() -> frozenset[str]:
    """What /proc/cpuinfo says the processor can do, `asimd` or `avx2` or ...; else what PyTorch makes of it.

    >>> isinstance(abilities(), frozenset)
    True
    """
    known = facts()
    listed = known.get("flags") or known.get("Features")
    return frozenset(listed.split()) if listed else _vouched_by_torch()


def available_cores() -> int:
    """Cores this process may run on.

    >>> available_cores() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def family() -> Family | None:
    """The kind of processor; None if there are no kernels for it.

    >>> family() in ("x86", "arm", None)
    True
    """
    return FAMILIES.get(platform.machine()) if sys.platform != "win32" else None


def lacks(variant: Variant) -> str | None:
    """Why this machine cannot run a variant, in words; None if it can.

    >>> from foveate.kernels.cpu.variants import BY_NAME
    >>> {lacks(BY_NAME["neon"]) is None, lacks(BY_NAME["avx2"]) is None} <= {True, False}
    True
    """
    if variant.family != family():
        return f"it is for {variant.family} processors, and this is {platform.machine()} with {platform.system()}"
    has = abilities()
    if missing := [name for name in variant.abilities if name not in has]:
        return f"this processor has no {', '.join(missing)}"
    if "amx_tile" in variant.abilities and (refusal := _tiles_refused()):
        return f"the system grants no AMX tiles: {refusal}"
    return None


def _vouched_by_torch() -> frozenset[str]:
    if family() == "arm":
        return frozenset(BY_NAME["neon"].abilities)
    try:
        import torch
    except ImportError:  # while it is installed
        return frozenset()
    names = TORCH_VOUCHES.get(torch.backends.cpu.get_cpu_capability(), ())
    return frozenset(ability for variant in VARIANTS if variant.name in names for ability in variant.abilities)


@cache
def _tiles_refused() -> str | None:
    """Ask Linux for the registers that AMX computes in: without leave, touching them ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0:
        return None
    return os.strerror(ctypes.get_errno())
