"""Keys and values of whole texts outside of a device's memory: in the host's, or in a file that is mapped into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from foveate.cache.tokens import Room, Tokens

LEAST = 256  # tokens that room is made for at first


class Offloaded:
    """Keys (B, G, n, D) and values (B, G, n, Dv) of all tokens of a text, fetched to the device a few at a time.

    With a ``folder`` they lie in files there, without names, that go with this object; else in the host's memory.
    ``written`` and ``read`` count the bytes that came and went.

    >>> store = Offloaded()
    >>> store.append(torch.zeros(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    >>> k, v = store.take(torch.tensor([[[0, 3], [1, 2]]]))
    >>> k.shape, store.written, store.read
    (torch.Size([1, 2, 2, 4]), 320, 128)
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = folder
        self.count = self.written = self.read = 0
        self.room: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x[:, :, : self.count] for x in self.room)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.room)

    def append(self, *new: Tensor) -> None:
        """More tokens: k (B, G, N, D) and v (B, G, N, Dv)."""
        end = self.count + new[0].shape[2]
        if not self.room or end > self.room[0].shape[2]:
            self._make_room(new, max(LEAST, end, 2 * self.count))
        for kept, x in zip(self.room, new, strict=True):
            kept[:, :, self.count : end].copy_(x.detach())
            self.written += x.nbytes
        self.count = end

    def take(self, index: Tensor) -> tuple[Tensor, ...]:
        """Tokens (B, G, K) of each head, on the device of ``index``."""
        where = index.to("cpu").unsqueeze(-1)
        taken = tuple(x.gather(2, where.expand(-1, -1, -1, x.shape[3])) for x in self.tensors)
        self.read += sum(x.nbytes for x in taken)
        return tuple(x.to(index.device) for x in taken)

    def listed(self, entry: Tensor, head: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        """Single tokens (n,) of entries and heads, on the device of ``token``: keys (n, D), values (n, Dv)."""
        at = tuple(x.to("cpu") for x in (entry, head, token))
        taken = tuple(x[at] for x in self.tensors)
        self.read += sum(x.nbytes for x in taken)
        return tuple(x.to(token.device) for x in taken)

    def select(self, entries: Tensor) -> None:
        """Batch entries (B',) of these, any of them several times."""
        kept, count = tuple(x[entries.to("cpu")] for x in self.tensors), self.count
        if kept:
            self.count = 0
            self._make_room(kept, max(LEAST, count))
            for room, x in zip(self.room, kept, strict=True):
                room[:, :, :count].copy_(x)
            self.count = count

    def _make_room(self, like: tuple[Tensor, ...], capacity: int) -> None:
        room = tuple(self._empty((*x.shape[:2], capacity, x.shape[3]), x.dtype) for x in like)
        if self.count:
            for to, kept in zip(room, self.tensors, strict=True):
                to[:, :, : self.count].copy_(kept)
        self.room = room

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (
            torch.empty(shape, dtype=dtype, device="cpu") if self.folder is None else mapped(self.folder, shape, dtype)
        )


def mapped(folder: str | os.PathLike[str], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file of a folder, mapped into memory; the file has no name and goes with the tensor."""
    size = torch.Size(shape).numel()
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix="foveate-", suffix=".kv")
    try:
        os.ftruncate(handle, max(size, 1) * dtype.itemsize)
        return torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
    finally:
        os.close(handle)
        os.unlink(name)  # the mapping keeps it alive


class HostTokens(Tokens):
    """Tokens in the host's memory, or in files of a ``folder``, wherever those come from that are appended.

    Where gradients are recorded they stay on their device, as autograd may hold them.
    """

    __slots__ = ("folder",)

    def __init__(self, batch: int, capacity: int | None = None, folder: str | os.PathLike[str] | None = None) -> None:
        super().__init__(batch, capacity)
        self.folder = folder

    def _with(self, room: Room, length: int) -> HostTokens:
        after = super()._with(room, length)
        assert isinstance(after, HostTokens)
        after.folder = self.folder
        return after

    def append(self, *new: Tensor) -> HostTokens:
        if not torch.is_grad_enabled():
            new = tuple(x.to("cpu") for x in new)
        after = super().append(*new)
        assert isinstance(after, HostTokens)
        return after

    def _empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.folder is None or like.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=like.device)
        return mapped(self.folder, shape, dtype)
