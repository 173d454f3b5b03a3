"""Selections of static patterns, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import torch
from torch import Tensor

from foveate.layouts.kinds import Layout
from foveate.patterns.algebra import Pattern
from foveate.patterns.identity import fields_of
from foveate.patterns.select.selection import Selection
from foveate.patterns.select.snapshot import Unknown, snapshot

MOST_BYTES = 256 * 2**20


class SelectionCache:
    """The selections used last, up to so many bytes; the newest stays however large it is. Safe among threads.

    What is asked for is known by what it holds, tensors by their content: a mask changed in place, through numpy or
    ``.data`` finds no old selection, and an equal mask in new memory finds its own again.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Selection, int]] = OrderedDict()
        self._lock = Lock()

    def get(
        self,
        pattern: Pattern,
        layout: Layout,
        n: int,
        m: int,
        tile: int,
        device: str,
        make: Callable[[], Selection],
        *,
        keys_of_visit: int = 0,
    ) -> Selection:
        """The selection kept for this pattern on this layout, else what ``make`` returns, kept from now on."""
        try:
            key = snapshot(pattern), snapshot(layout), n, m, tile, device, keys_of_visit
        except Unknown:
            return make()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        with torch.inference_mode(False):  # else it could serve no call that wants gradients
            made = make()
        self._keep(key, made)
        return made

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def _keep(self, key: Hashable, selection: Selection) -> None:
        if not all(type(x) is Tensor for x in _tensors(selection)):  # made while tensors are only traced
            return
        size = bytes_of(selection)
        with self._lock:
            if key in self._kept:  # another thread was as quick
                return
            self._kept[key] = selection, size
            self.bytes += size
            while self.bytes > self.most_bytes and len(self._kept) > 1:
                _, (_, freed) = self._kept.popitem(last=False)
                self.bytes -= freed


def bytes_of(selection: Selection) -> int:
    """Of a selection's tensors and of those it derives from them when first asked for."""
    derived = 8 * (selection.num_tiles + selection.num_columns + selection.num_rows) + 8 * selection.masks.nbytes
    return derived + sum(x.nbytes for x in _tensors(selection))


def _tensors(selection: Selection) -> list[Tensor]:
    return [x for x in fields_of(selection).values() if isinstance(x, Tensor)]


SELECTIONS = SelectionCache()
