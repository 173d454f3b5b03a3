"""`python -m foveate.kernels.cpu.build`: compile the kernels by hand."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from foveate.kernels.cpu.build import build, build_cached
from foveate.kernels.cpu.cache import is_intact
from foveate.kernels.cpu.compiler import CannotCompile, Compiler, find_compiler
from foveate.kernels.cpu.processor import family
from foveate.kernels.cpu.variants import BY_NAME, SOURCES, VARIANTS, Variant


def main(arguments: list[str] | None = None) -> None:
    """Compile; status 1 if something asked for, or everything, was refused.

    >>> main(["--isa", "sse"])
    Traceback (most recent call last):
    SystemExit: 2
    """
    asked = _parser().parse_args(arguments)
    if asked.sanitize:
        os.environ["FOVEATE_SANITIZE"] = "1"
    variants = [BY_NAME[name] for name in asked.isa or []] or [each for each in VARIANTS if each.family == family()]
    try:
        compiler = find_compiler()
    except CannotCompile as reason:
        sys.exit(str(reason))
    made = [_compile(variant, compiler, asked.into, asked.force) for variant in variants]
    sys.exit(0 if made and (all(made) if asked.isa else any(made)) else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m foveate.kernels.cpu.build", description="Compile the native kernels.")
    parser.add_argument("--isa", action="append", choices=BY_NAME, help="this variant (may be repeated)")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="write there, not into the user's cache")
    parser.add_argument("--force", action="store_true", help="compile even what the cache holds")
    parser.add_argument("--sanitize", action="store_true", help="with address and undefined-behaviour checks")
    return parser


def _compile(variant: Variant, compiler: Compiler, into: Path | None, force: bool) -> bool:
    start = time.perf_counter()
    try:
        if into:
            path, compiled = _compile_into(into, variant, compiler), True
        else:
            path, compiled = build_cached(variant, SOURCES, compiler, (lambda _: False) if force else is_intact)
    except CannotCompile as error:
        print(f"{variant.name}: not compiled: {error}")
        print(error.output, end="", file=sys.stderr)
        return False
    print(f"{variant.name}: {f'{time.perf_counter() - start:.1f} s' if compiled else 'there already'}, {path}")
    return True


def _compile_into(folder: Path, variant: Variant, compiler: Compiler) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (built,) = build([variant], SOURCES, folder, compiler)
    if built.error:
        raise built.error
    return built.path
