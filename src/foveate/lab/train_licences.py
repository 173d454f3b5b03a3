"""Which licences let a file be learned from: permissive ones only, read from a distribution's own metadata."""

from __future__ import annotations

import re
from email.message import Message

PERMISSIVE = frozenset(
    "0BSD Apache-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python HPND ISC MIT MIT-0 MIT-CMU PSF-2.0 "
    "Python-2.0 Unlicense Zlib".split()
)

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
} | {name.lower(): name for name in PERMISSIVE}


def is_permissive(expression: str) -> bool:
    """Whether an SPDX expression can be met with permissive licences alone.

    >>> is_permissive("Apache-2.0 OR GPL-3.0-only"), is_permissive("MIT AND MPL-2.0")
    (True, False)
    """
    plain = re.sub(r"\s+WITH\s+\S+", "", expression)
    if "(" in plain:
        names = re.split(r"\s+(?:AND|OR)\s+", re.sub(r"[()]", "", plain))
        return all(name.strip() in PERMISSIVE for name in names)
    choices = re.split(r"\s+OR\s+", plain)
    return any(all(name.strip() in PERMISSIVE for name in re.split(r"\s+AND\s+", choice)) for choice in choices)


def permissive_licence(metadata: Message) -> str | None:
    """The licence of a distribution if it is permissive, else None: expression, then classifiers, then text."""
    expression = str(metadata.get("License-Expression") or "").strip()
    if expression:
        return expression if is_permissive(expression) else None
    prefix = "License :: OSI Approved :: "
    named = [str(c).removeprefix(prefix) for c in metadata.get_all("Classifier") or [] if str(c).startswith(prefix)]
    if named:
        known = [_CLASSIFIERS.get(name) for name in named]
        return None if None in known else " AND ".join(sorted({str(name) for name in known}))
    free = str(metadata.get("License") or "").strip()
    return _FREE_TEXT.get(free.lower()) or (free if free and is_permissive(free) else None)
