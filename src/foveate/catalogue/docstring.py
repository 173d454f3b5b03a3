"""The docstring of a mechanism: what its class says, and what its row knows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from foveate.catalogue.options import options_of
from foveate.catalogue.papers import Reference, is_arxiv

if TYPE_CHECKING:
    from foveate.catalogue.registry import Row


def docstring(row: Row) -> str:
    """The class's own docstring, the formula, the papers, the notes, and an example where it has none.

    >>> from foveate.catalogue.registry import row
    >>> print(row("efla").mixer.__doc__)
    The delta rule followed for a time beta instead of one step: dS/dt = -k k^T S + k v^T, solved exactly.
    ...
    """
    own = inspect.cleandoc(vars(row.mixer).get("__doc__") or "")
    papers = "\n".join(map(_cited, row.papers or (row.source,)))
    example = "" if ">>>" in own else _example(row)
    return "\n\n".join(filter(None, (own, row.formula, papers, row.notes, example))) + "\n"


def _cited(source: Reference) -> str:
    where = f"arXiv {source.id}" if is_arxiv(source.id) else source.id
    return ", ".join(filter(None, (source.authors, source.title, where))) + "."


def _example(row: Row) -> str:
    """Tokens in, tokens out."""
    heads = ", heads=4" if "heads" in options_of(row.mixer) else ""
    layout = next(iter(getattr(row.mixer, "grids", ())), None)
    length = 50 if layout is None else layout.length
    lines = [
        "import torch",
        "" if layout is None else f"from foveate import {type(layout).__name__}",
        f"mixer = {row.mixer.__name__}(64{heads})",
        f"mixer(torch.randn(2, {length}, 64){'' if layout is None else f', layout={layout}'}).shape",
    ]
    return "\n".join([*(f">>> {line}" for line in lines if line), f"torch.Size([2, {length}, 64])"])
