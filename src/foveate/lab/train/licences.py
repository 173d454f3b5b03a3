"""Which licences let a file be learned from: permissive ones, as a distribution's own metadata names them."""

from __future__ import annotations

import re
from importlib.metadata import PackageMetadata

# fmt: off
PERMISSIVE = frozenset({
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC",
    "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
})
# fmt: on

_CLASSIFIER = "License :: OSI Approved :: "
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "zlib/libpng License": "Zlib",
}

_FREE_TEXT = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
    "new bsd": "BSD-3-Clause",
}


def is_permissive(expression: str) -> bool:
    """Whether an SPDX expression can be met with permissive licences alone; with brackets, all must be.

    >>> is_permissive("Apache-2.0 OR GPL-3.0-only"), is_permissive("MIT AND MPL-2.0")
    (True, False)
    """
    plain = re.sub(r"\s+WITH\s+[\w.-]+", "", expression)
    if "(" in plain:
        plain = re.sub(r"[()]", "", plain).replace(" OR ", " AND ")
    choices = [choice.split(" AND ") for choice in plain.split(" OR ")]
    return any(all(name.strip() in PERMISSIVE for name in choice) for choice in choices)


def permissive_licence(metadata: PackageMetadata) -> str | None:
    """A distribution's licence if permissive, else None: by its expression, else classifiers, else text."""
    expression = _field(metadata, "License-Expression")
    if expression:
        return expression if is_permissive(expression) else None
    classifiers = [str(classifier) for classifier in metadata.get_all("Classifier") or []]
    named = [name.removeprefix(_CLASSIFIER) for name in classifiers if name.startswith(_CLASSIFIER)]
    if named:
        known = {_CLASSIFIERS.get(name, "") for name in named}
        return None if "" in known else " AND ".join(sorted(known))
    free = _field(metadata, "License")
    return _FREE_TEXT.get(free.lower()) or (free if is_permissive(free) else None)


def _field(metadata: PackageMetadata, name: str) -> str:
    return str(metadata[name] or "").strip() if name in metadata else ""
