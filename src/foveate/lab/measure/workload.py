"""What a language model is fed: windows of real text."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_BYTES_A_TOKEN = 16  # text cut for one window holds this many bytes for each of its tokens
SHORTEST = 16  # tokens in a window
FIRST_ASK = 5  # bytes of the built-in text asked for per token


@dataclass(frozen=True)
class Text:
    """Text, where it comes from, and what had to be done to it."""

    content: str
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The tokens that a model expects before and behind a text."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.start) + len(self.end)


def frame_of(tokenizer: Any) -> Frame:
    """What the tokenizer puts around a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(encoded.input_ids), list(encoded.special_tokens_mask)
    body = special.index(0) if 0 in special else len(ids)
    after = special[::-1].index(0) if 0 in special else 0
    return Frame(tuple(ids[:body]), tuple(ids[len(ids) - after :]))


@dataclass(frozen=True)
class Workload:
    """W windows of L tokens (W, L), and the bytes of text (W, L) that each token stands for."""

    ids: Tensor
    bytes: Tensor
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


def read_all(sources: str | Path | Sequence[str | Path] | None, enough: int) -> list[Text]:
    """The text of each source, as :func:`read` takes them; one source alone need not be in a list."""
    if sources is None or isinstance(sources, (str, Path)):
        return [read(sources, enough)]
    given = list(dict.fromkeys(map(str, sources)))
    return [read(source, enough) for source in given] or [read(None, enough)]


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
        return _decode(path.read_bytes(), shown(path.name))  # results may be shown: no folders of this machine
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) or "null byte" in str(error):
            raise ValueError(f"cannot read the text {shown(str(source))}: {_why(error)}") from None
        raise


def shown(name: str) -> str:
    """A file's name as it can be printed and stored: bytes that are not UTF-8 become U+FFFD.

    >>> shown("a\\udcff.txt")
    'a\ufffd.txt'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


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
            notes.append(shown(f"of {folder.name}, the files up to {file.relative_to(folder)} were enough"))
            break
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        data = b"\0" if hidden else file.read_bytes()
        if b"\0" not in data:
            parts.append(data.decode("utf-8", errors="replace"))
            size += len(data)
    if not parts:
        raise ValueError(f"there is no text file in {shown(str(folder))}")
    return Text("\n".join(parts), shown(folder.resolve().name), tuple(notes))


def cut(tokenizer: Any, texts: Sequence[Text], length: int, windows: int, frame: Frame | None = None) -> Workload:
    """Windows of ``length`` tokens out of every text: ``windows`` in all, or one of each where there are more texts.

    They lie evenly over a long text, one after the other in a short one. Texts too short for a window are joined.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the model's tokenizer must be a fast one (tokenizer.json) to count the bytes of tokens")
    frame = _start_only(tokenizer) if frame is None else frame
    texts = _joined(tokenizer, texts, length - frame.size)
    found: list[tuple[Tensor, Tensor]] = []
    notes = [note for text in texts for note in text.notes]
    for number, text in enumerate(texts):
        share = max(1, windows // len(texts) + (number < windows % len(texts)))
        own = _cut_one(tokenizer, text, length, share, frame)
        if len(own) < share:
            notes.append(f"{text.source} has {len(own)} windows of {length} tokens, not {share}")
        found += own
    ids, sizes = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Workload(ids, sizes, ", ".join(text.source for text in texts), tuple(notes))


def _start_only(tokenizer: Any) -> Frame:
    return Frame(frame_of(tokenizer).start)


def _joined(tokenizer: Any, texts: Sequence[Text], body: int) -> list[Text]:
    """Texts with room for a window each; those without are joined into one."""
    if len(texts) == 1:
        return list(texts)
    short = [text for text in texts if _num_tokens(tokenizer, text.content[: MOST_BYTES_A_TOKEN * body]) < body]
    if not short:
        return list(texts)
    source, notes = ", ".join(text.source for text in short), tuple(note for text in short for note in text.notes)
    together = Text("\n".join(text.content for text in short), source, notes)
    return [*(text for text in texts if text not in short), together]


def _cut_one(tokenizer: Any, text: Text, length: int, windows: int, frame: Frame) -> list[tuple[Tensor, Tensor]]:
    room = MOST_BYTES_A_TOKEN * length
    stride = len(text.content) // windows
    if stride > room:
        pieces = [text.content[at * stride : at * stride + room] for at in range(windows)]
        found = [window for piece in pieces for window in _windows(tokenizer, piece, length, frame)[:1]]
    else:
        found = _windows(tokenizer, text.content, length, frame)[:windows]
    if not found:
        raise ValueError(_too_short(tokenizer, text, length, frame))
    return found


def _windows(tokenizer: Any, text: str, length: int, frame: Frame) -> list[tuple[Tensor, Tensor]]:
    """Tokens of each window, and the bytes of text from each token to the next; none for what frames it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded.input_ids
    starts = [*(begin for begin, _ in encoded.offset_mapping), len(text)]
    body = length - frame.size
    before, after = [0] * len(frame.start), [0] * len(frame.end)
    found = []
    for first in range(0, len(ids) - body + 1, body):
        sizes = [
            len(text[starts[at] : starts[at + 1]].encode("utf-8", errors="replace"))
            for at in range(first, first + body)
        ]
        window = [*frame.start, *ids[first : first + body], *frame.end]
        found.append((torch.tensor(window), torch.tensor([*before, *sizes, *after])))
    return found


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _too_short(tokenizer: Any, text: Text, length: int, frame: Frame) -> str:
    tokens = _num_tokens(tokenizer, text.content)
    window = f"a window takes {length - frame.size:,}"
    if tokens + frame.size < SHORTEST:
        return f"{text.source} has {tokens:,} tokens, and {window}, {SHORTEST} at the least: give more text"
    most = 2 ** ((tokens + frame.size).bit_length() - 1)
    return f"{text.source} has {tokens:,} tokens, and {window}: give more text, or ask for less with --length {most}"
