"""The search for a library of kernels: in the package, then in the user's cache, then by compiling it."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Literal

from foveate.kernels.cpu import cache
from foveate.kernels.cpu.build import build_cached
from foveate.kernels.cpu.compiler import CannotCompile, find_compiler
from foveate.kernels.cpu.processor import lacks
from foveate.kernels.cpu.shared_object import Unusable, open_library
from foveate.kernels.cpu.trust import distrusted
from foveate.kernels.cpu.variants import BY_NAME, SOURCES, VARIANTS, Variant, source_hash, units

Origin = Literal["package", "cache", "compiled"]
Found = tuple[ctypes.CDLL, Path, Origin, tuple[str, ...]]
PATIENCE = 2.0  # seconds of compiling before we say so


@dataclass(frozen=True)
class Status:
    """Which library is in use and where it came from, or why there is none; why others were passed over.

    Cautions say why a cache was not used, or a process that was forked has one thread.
    """

    isa: str | None = None
    path: str | None = None
    origin: Origin | None = None
    reason: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    cautions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A library, or none, and the record of it."""

    library: ctypes.CDLL | None
    status: Status


@dataclass(frozen=True)
class Places:
    """Where the sources are, and the libraries built at install."""

    sources: Path = SOURCES
    packaged: Path = SOURCES.parent / "lib"

    def hash_for(self, variant: Variant) -> str | None:
        """What a library must be made from; None (anything) where there are no sources to compare it with."""
        return source_hash(self.sources, variant.flags) if units(self.sources) else None


def search(places: Places) -> Loaded:
    """Open the best library for this machine, or the one that FOVEATE_ISA names."""
    asked = os.environ.get("FOVEATE_ISA", "")
    if asked == "none":
        return Loaded(None, Status(reason="switched off by FOVEATE_ISA=none"))
    unfit = {variant.name: reason for variant in VARIANTS if (reason := lacks(variant))}
    _check(asked, unfit)
    unwanted = {name: f"FOVEATE_ISA asks for {asked}" for name in BY_NAME if asked not in ("", name)}
    skipped, failures = unwanted | unfit, []
    for variant in (variant for variant in VARIANTS if variant.name not in skipped):
        try:
            found, path, origin, cautions = _obtain(variant, places)
        except Unusable as why:
            failures.append(f"no kernels for {variant.name}: {why}")
            skipped[variant.name] = str(why)
        else:
            status = Status(variant.name, str(path), origin, skipped=tuple(skipped.items()), cautions=cautions)
            return Loaded(found, status)
    reason = failures[0] if failures else "there are no native kernels for this processor"
    return Loaded(None, Status(reason=reason, skipped=tuple(skipped.items())))


def _check(asked: str, unfit: dict[str, str]) -> None:
    """Refuse a FOVEATE_ISA that nobody knows, or that this machine cannot run."""
    if not asked or (asked in BY_NAME and asked not in unfit):
        return
    why = unfit.get(asked, "there is no such variant")
    possible = [name for name in BY_NAME if name not in unfit]
    raise ValueError(f"FOVEATE_ISA={asked}: {why}; possible here: {', '.join([*possible, 'none'])}")


def _obtain(variant: Variant, places: Places) -> Found:
    """A variant's library, wherever it can be had; Unusable with all the reasons if nowhere."""
    reasons = []
    for source in (_packaged, _kept, _compiled):
        try:
            if found := source(variant, places):
                return found
        except (Unusable, CannotCompile) as reason:
            reasons.append(str(reason))
    raise Unusable("; ".join(reasons))


def _packaged(variant: Variant, places: Places) -> Found | None:
    path = places.packaged / f"{variant.name}.so"
    if not path.exists():
        return None
    try:
        return open_library(path, variant, places.hash_for(variant)), path, "package", ()
    except Unusable as reason:
        raise Unusable(f"the one in the package is of no use: {reason}") from reason


def _kept(variant: Variant, places: Places) -> Found | None:
    wanted = places.hash_for(variant)
    for path in cache.find(variant.name, wanted, _compiler_version()) if wanted else ():
        with suppress(Unusable):
            return open_library(path, variant, wanted), path, "cache", _cautions(path)
    return None


def _compiled(variant: Variant, places: Places) -> Found:
    wanted = places.hash_for(variant)
    if wanted is None:
        raise Unusable("there are no sources to compile")
    if os.environ.get("FOVEATE_NO_JIT", "0") not in ("", "0"):
        raise Unusable("FOVEATE_NO_JIT forbids to compile it")
    opens = partial(_opens, variant=variant, wanted=wanted)
    refusals: list[str] = []
    with _announced(f"foveate: compiling the {variant.name} kernels for this machine, once"):
        path, compiled_now = build_cached(variant, places.sources, find_compiler(), opens, refusals)
    origin: Origin = "compiled" if compiled_now else "cache"
    return open_library(path, variant, wanted), path, origin, _cautions(path, refusals)


def _cautions(path: Path, refusals: Sequence[str] = ()) -> tuple[str, ...]:
    """Why a library does not lie in the first place where it could."""
    passed_over = takewhile(lambda root: not path.is_relative_to(root), cache.roots())
    distrust = (distrusted(root) for root in passed_over if os.path.lexists(root))
    reasons = dict.fromkeys([*filter(None, distrust), *refusals])
    return tuple(f"not kept in the user's cache: {reason}" for reason in reasons)


def _opens(path: Path, variant: Variant, wanted: str) -> bool:
    try:
        return cache.is_intact(path) and bool(open_library(path, variant, wanted))
    except Unusable:
        return False


def _compiler_version() -> str | None:
    try:
        return find_compiler().version
    except CannotCompile:
        return None


@contextmanager
def _announced(line: str) -> Iterator[None]:
    """Say on standard error what takes so long, if it does."""
    patience = threading.Timer(PATIENCE, lambda: print(line, file=sys.stderr, flush=True))
    patience.daemon = True
    patience.start()
    try:
        yield
    finally:
        patience.cancel()
