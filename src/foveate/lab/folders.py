"""Folders that results are written to: refused before any work where it would be lost, or would destroy other work."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_writable(folder: Path, *, make: bool = True) -> None:
    """ValueError, in words, for a place where no folder is (or, with ``make``, can be made) and can be written to."""
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if _is_there(place))
    except (OSError, ValueError) as error:  # a name too long, a zero byte
        raise ValueError(f"{folder} cannot be a folder: {getattr(error, 'strerror', None) or error}") from None
    if nearest != folder and not make:
        raise ValueError(f"there is no folder {folder}")
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file, and results go to a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written to {nearest}: no permission")


def _is_there(place: Path) -> bool:
    """Like ``place.exists()``, but a name that no file can have is an error."""
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_free(folder: Path, names: Sequence[str], *, resume: bool, force: bool) -> None:
    """ValueError where a folder holds files of these names that nobody asked to keep or to write over."""
    check_writable(folder)
    held = [name for name in names if os.path.lexists(folder / name)]
    if held and not (resume or force):
        raise ValueError(
            f"{folder} already holds {' and '.join(held)}: --resume keeps what was measured, --force writes over it, "
            "or name another folder with --out"
        )


def read_json(file: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """An object of a JSON file that was written here before; ValueError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__} where an object is expected")
    missing = [name for name in needs if name not in found]
    if missing:
        raise ValueError(f"{file} is not what was written here: it has no {missing[0]!r}")
    return found
