"""What a language model is fed: windows of real text."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_BYTES_A_TOKEN = 16  # text cut for one window holds this many bytes for each of its tokens
FIRST_ASK = 5  # bytes of the built-in text asked for per token


@dataclass(frozen=True)
class Text:
    """Text, where it comes from, and what had to be done to it."""

    content: str
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    """W windows of L tokens; ``num_bytes`` is the size of the text that is predicted (all but first tokens)."""

    ids: Tensor
    num_bytes: int
    source: str
    notes: tuple[str, ...]

    @property
    def windows(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def digest(self) -> str:
        """Names these very tokens."""
        return hashlib.sha256(self.ids.to(torch.int64).numpy().tobytes()).hexdigest()[:16]


def read(source: str | Path | None, enough: int) -> Text:
    """Text of a file, of the text files of a directory, of standard input ("-"), or (None) Foveate's held-out text.

    ``enough`` bytes will do where there is a choice. ValueError, in words, for what is not there or not text.
    """
    if source is None:
        from foveate.models.builtin import heldout_text

        return Text(heldout_text(enough), "held-out code of the Python standard library")
    if str(source) == "-":
        return _decode(sys.stdin.buffer.read(), "standard input")
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_directory(path, enough * MOST_BYTES_A_TOKEN)
    try:
        return _decode(path.read_bytes(), path.name)  # results may be shown to others: no folders of this machine
    except OSError as error:
        raise ValueError(f"cannot read the text {source}: {error.strerror}") from None


def _decode(data: bytes, source: str) -> Text:
    if b"\0" in data:
        raise ValueError(f"{source} is binary (it holds zero bytes): give a text file, a directory of them, or -")
    try:
        return Text(data.decode("utf-8"), source)
    except UnicodeDecodeError:
        note = f"{source} is not UTF-8 throughout: what could not be read was replaced by U+FFFD"
        return Text(data.decode("utf-8", errors="replace"), source, (note,))


def _read_directory(folder: Path, enough: int) -> Text:
    """The text files below a folder, in the order of their names; hidden and binary ones are left out."""
    parts: list[str] = []
    size = 0
    notes: list[str] = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if size >= enough:
            notes.append(f"of {folder.name}, the files up to {file.relative_to(folder)} were enough")
            break
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        data = b"\0" if hidden else file.read_bytes()
        if b"\0" not in data:
            parts.append(data.decode("utf-8", errors="replace"))
            size += len(data)
    if not parts:
        raise ValueError(f"there is no text file in {folder}")
    return Text("\n".join(parts), folder.resolve().name, tuple(notes))


def cut(tokenizer: Any, text: Text, length: int, windows: int) -> Workload:
    """Windows of ``length`` tokens: spread evenly over a long text, one after the other in a short one."""
    if not tokenizer.is_fast:
        raise ValueError("the model's tokenizer must be a fast one (tokenizer.json) to count the bytes of tokens")
    room = MOST_BYTES_A_TOKEN * length
    stride = len(text.content) // windows
    if stride > room:
        pieces = [text.content[at * stride : at * stride + room] for at in range(windows)]
        found = [window for piece in pieces for window in _windows(tokenizer, piece, length)[:1]]
    else:
        found = _windows(tokenizer, text.content, length)[:windows]
    if not found:
        raise ValueError(_too_short(tokenizer, text, length))
    notes = list(text.notes)
    if len(found) < windows:
        notes.append(f"the text has {len(found)} windows of {length} tokens, not the {windows} asked for")
    ids = torch.stack([ids for ids, _ in found])
    return Workload(ids, sum(size for _, size in found), text.source, tuple(notes))


def _windows(tokenizer: Any, text: str, length: int) -> list[tuple[Tensor, int]]:
    """Tokens of each window and the bytes of text that its predictions cover."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start = _start_token(tokenizer)
    ids, begins = encoded.input_ids, [begin for begin, _ in encoded.offset_mapping]
    body = length - len(start)
    found = []
    for first in range(0, len(ids) - body + 1, body):
        last = first + body
        predicted_from = begins[first] if start else begins[first + 1]
        predicted_to = begins[last] if last < len(begins) else len(text)
        size = len(text[predicted_from:predicted_to].encode("utf-8", errors="replace"))
        found.append((torch.tensor(start + ids[first:last]), size))
    return found


def _start_token(tokenizer: Any) -> list[int]:
    """The token this model expects at the beginning of every text, if it expects one."""
    start = tokenizer.bos_token_id
    begins = tokenizer("a").input_ids[:1]
    return begins if start is not None and begins == [start] else []


def _too_short(tokenizer: Any, text: Text, length: int) -> str:
    tokens = len(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids)
    return (
        f"{text.source} has {tokens:,} tokens, and a window takes {length:,}: "
        f"give more text, or ask for less with --length {max(16, 2 ** max(tokens, 1).bit_length() // 4)}"
    )
