"""Real code and prose that every Python environment already holds, under permissive licences only.

Files are named relative to their distribution (`cpython/Lib/argparse.py`, `numpy/numpy/linalg/_linalg.py`),
so that a list of them means the same on every machine.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path, PurePosixPath

from foveate.lab.train.licences import permissive_licence

SUFFIXES = frozenset({".py", ".md", ".rst", ".txt"})
# fmt: off
SKIPPED_FOLDERS = frozenset({
    "__pycache__", "_vendor", "data", "datasets", "encodings", "externals", "idle_test", "licenses",
    "pydoc_data", "site-packages", "test", "testdata", "tests", "unidata", "vendor", "vendored",
})
# fmt: on
_LIB = "cpython/Lib/"
WHOLE_HELDOUT = (f"{_LIB}argparse.py", f"{_LIB}asyncio/", f"{_LIB}json/", f"{_LIB}tarfile.py")
HELDOUT_ONE_IN = 40
MIN_CHARS, MAX_CHARS = 200, 400_000
MAX_BYTES = 8_000_000
_GENERATED = re.compile(r"generated (?:by|from|file|with)|auto-?generated|do not edit", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """One file: its name relative to its distribution, its text, the distribution and the licence."""

    path: str
    text: str
    source: str
    licence: str

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.path).parent)


@dataclass(frozen=True)
class Source:
    """A distribution that may be learned from: its files by relative name, and its README."""

    name: str
    version: str
    licence: str
    files: dict[str, Path]
    readme: str = ""


def cpython() -> Source:
    """The running interpreter's standard library, files named `Lib/...`."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if is_wanted(path.relative_to(root).as_posix()))
    files = {f"Lib/{path.relative_to(root).as_posix()}": path for path in paths}
    return Source("cpython", sysconfig.get_python_version(), "PSF-2.0", files)


def installed() -> list[Source]:
    """Every installed distribution whose own metadata names permissive licences only."""
    distributions = {str(dist.name).lower(): dist for dist in metadata.distributions()}
    found = []
    for name, dist in sorted(distributions.items()):
        licence = permissive_licence(dist.metadata)
        if licence and name != "foveate":
            found.append(_from_distribution(name, dist, licence))
    return found


def _from_distribution(name: str, dist: metadata.Distribution, licence: str) -> Source:
    wanted = [file for file in dist.files or [] if is_wanted(file.as_posix())]
    files = {file.as_posix(): Path(str(file.locate())) for file in sorted(wanted)}
    return Source(name, dist.version, licence, files, readme=_readme(dist))


def _readme(dist: metadata.Distribution) -> str:
    text = dist.read_text("METADATA") or ""
    return text.partition("\n\n")[2]


def is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part in SKIPPED_FOLDERS or part.endswith((".dist-info", "-packages")) for part in path.parts)
    legal = re.match(r"licen|copying|notice", path.name, re.IGNORECASE)
    return path.suffix in SUFFIXES and not hidden and not legal and ".." not in path.parts


def is_natural(text: str) -> bool:
    """Whether a person wrote this text: not generated, minified, nor a table of data.

    >>> is_natural("def area(width, height):\\n    return width * height\\n" * 10)
    True
    >>> is_natural("0x1f, 0x2e, 0x3d, 0x4c\\n" * 100)
    False
    """
    if not MIN_CHARS <= len(text) <= MAX_CHARS or _GENERATED.search(text[:600]):
        return False
    lines = text.splitlines()
    letters = sum(map(str.isalpha, text)) / len(text)
    digits = sum(map(str.isdigit, text)) / len(text)
    return letters > 0.4 and digits < 0.12 and max(map(len, lines)) < 1500 and len(text) / len(lines) < 120


def collect(sources: Iterable[Source] | None = None, *, max_bytes_per_source: int = 8_000_000) -> list[Document]:
    """Every admissible file of the sources (default: the standard library and what is installed), once each.

    Of exact duplicates one is kept, a held-out one if there is any: nothing held out has a twin elsewhere.

    >>> documents = collect([cpython()], max_bytes_per_source=100_000)
    >>> documents[0].licence
    'PSF-2.0'
    """
    chosen = [cpython(), *installed()] if sources is None else list(sources)
    documents = [doc for source in chosen for doc in _capped(_read(source), max_bytes_per_source)]
    kept = {digest(doc.text): doc for doc in sorted(documents, key=lambda doc: is_heldout(doc.path))}
    return [doc for doc in documents if kept[digest(doc.text)] is doc]


def _read(source: Source) -> Iterator[Document]:
    if is_natural(source.readme):
        yield Document(f"{source.name}/README", source.readme, source.name, source.licence)
    for name, path in source.files.items():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if is_natural(text):
            yield Document(f"{source.name}/{name}", text, source.name, source.licence)


def _capped(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """Whole folders, in an order that depends only on their names, until the budget is full."""
    ordered = sorted(documents, key=_order)
    folders = {name: list(group) for name, group in groupby(ordered, key=lambda doc: doc.folder)}
    kept, used = [], 0
    for name in sorted(folders, key=digest):
        size = sum(len(doc.text.encode()) for doc in folders[name])
        if used + size > max_bytes:
            kept += [doc for doc in folders[name] if is_heldout(doc.path)]
        else:
            kept += folders[name]
            used += size
    return sorted(kept, key=_order)


def _order(document: Document) -> tuple[str, str]:
    return document.folder, document.path


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_heldout(path: str) -> bool:
    """Whether a file is never trained on: a few whole modules, and one file in forty by the hash of its name.

    >>> is_heldout("cpython/Lib/argparse.py"), is_heldout("cpython/Lib/json/decoder.py")
    (True, True)
    """
    return path.startswith(WHOLE_HELDOUT) or int(digest(path), 16) % HELDOUT_ONE_IN == 0


def join(documents: Iterable[Document]) -> list[str]:
    """One long text per folder, files in order, each under its name: a long context worth reading."""
    folders = groupby(documents, key=lambda doc: (doc.source, doc.folder))
    return ["\n\n".join(f"# {doc.path}\n{doc.text}" for doc in group) for _, group in folders]
