"""Opening a library of kernels, once it is known to be the right one."""

from __future__ import annotations

import ctypes
from pathlib import Path

from foveate.kernels.cpu.variants import ABI, Variant


class Unusable(Exception):
    """Why a library is not used, in words."""


def open_library(path: Path, variant: Variant, source_hash: str | None) -> ctypes.CDLL:
    """The library, if it holds this variant, made from these sources (None: from any)."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unusable(f"it does not load: {error}") from error
    if reason := _mismatch(library, variant, source_hash):
        _close(library)
        raise Unusable(reason)
    return library


def _mismatch(library: ctypes.CDLL, variant: Variant, source_hash: str | None) -> str | None:
    try:
        abi, isa, made_from = library.foveate_abi(), _text(library.foveate_isa), _text(library.foveate_source_hash)
    except AttributeError:
        return "it is no library of Foveate's"
    if abi != ABI:
        return f"it was built for version {abi} of the interface, and this is version {ABI}"
    if isa != variant.name:
        return f"it holds the kernels for {isa}"
    if source_hash is not None and made_from != source_hash:
        return "it was built from other sources"
    if hasattr(library, "foveate_prepare") and library.foveate_prepare() != 0:
        return "the operating system does not let this process use its instructions"
    return None


def _text(function: ctypes._NamedFuncPointer) -> str:
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _close(library: ctypes.CDLL) -> None:
    """Let go of it: the system would else answer with it when a mended one is opened under the same name."""
    close = ctypes.CDLL(None).dlclose
    close.argtypes = [ctypes.c_void_p]
    close(library._handle)
