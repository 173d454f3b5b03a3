"""Names for the shell to complete, from the index: importing the catalogue takes seconds."""

from __future__ import annotations


def mechanisms(incomplete: str) -> list[str]:
    """Mechanisms of the catalogue whose names begin so.

    >>> mechanisms("streaming")
    ['streaming_llm']
    """
    from foveate.catalogue.index import indexed

    return sorted(name for name in indexed() if name.startswith(incomplete))
