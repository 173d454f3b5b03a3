"""A decoding step over stored keys and values: bytes read a second beside what the machine reads at best.

python -m benchmarks.stored_decode [--megabytes 96] [--repeats 7]

Every form holds about as many bytes. Times are those of one thread's own clock, by turns, and the least of them is
taken. The limit is that of reading as many bytes from end to end, taken by turns with them; beside it what it takes to
make floats of the codes first.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import RESULTS, write_json
from foveate.attention.stored import Segment, attend_stored, quantise
from foveate.kernels.cpu.loader import library
from foveate.lab.measure import machine

SETTINGS = {"megabytes": 96, "repeats": 7}
HEADS, DIM, PAGE = 8, 128, 64
FORMATS = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}  # bytes of a number
FORMS = ("contiguous", "paged", "ragged")
SLOW = 4  # dequantising takes so much longer that it is tried on fewer repeats


def segment(format: str, form: str, tokens: int) -> Segment:
    """Random keys and values of 8 heads; pages lie in random order, ragged heads hold from a half to all tokens."""
    pages = tokens // PAGE
    shape = (1, HEADS, tokens, DIM) if form == "contiguous" else (HEADS * pages, 1, PAGE, DIM)
    x = torch.randn(shape)
    if format in ("float32", "bfloat16"):
        stored: Any = x.to(getattr(torch, format)), x.to(getattr(torch, format)).clone()
    else:
        stored = quantise(x, format, by="channel", group=PAGE), quantise(x, format)
    if form == "contiguous":
        return Segment(stored[0], stored[1])
    share = torch.linspace(0.5, 1, HEADS) if form == "ragged" else torch.ones(HEADS)
    lengths = (share * tokens).long().unsqueeze(0)
    return Segment(stored[0], stored[1], pages=torch.randperm(HEADS * pages).view(1, HEADS, pages), lengths=lengths)


def bytes_read(one: Segment) -> int:
    """Of the tokens there are, with their scales."""
    held = sum(
        sum(part.nbytes for part in ((x,) if isinstance(x, torch.Tensor) else x.tensors)) for x in (one.k, one.v)
    )
    return int(held * int(one.counts.sum()) / (HEADS * one.slots))


def least(works: dict[str, tuple[Callable[[], Any], int]]) -> dict[str, float]:
    """CPU seconds of each, by turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(max(repeats for _, repeats in works.values())):
        for name, (work, repeats) in works.items():
            if turn < repeats:
                start = time.thread_time()
                work()
                taken[name].append(time.thread_time() - start)
    return {name: min(each) for name, each in taken.items()}


def case(format: str, form: str, queries: int, options: Any) -> dict[str, Any]:
    tokens = int(options.megabytes * 2**20 / (2 * HEADS * DIM * FORMATS[format])) // PAGE * PAGE
    one, q = segment(format, form, tokens), torch.randn(1, HEADS * queries, 1, DIM)
    size = bytes_read(one)
    source, native = torch.ones(size, dtype=torch.uint8), library()
    assert native is not None
    read = native.foveate_peak_read
    read.restype, read.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    works = {
        "stored": (lambda: attend_stored(q, [one], impl="native"), options.repeats),
        "reading": (lambda: read(source.data_ptr(), size, 1), options.repeats),
        "dequantised": (lambda: attend_stored(q, [one], impl="reference"), max(options.repeats // SLOW, 1)),
    }
    with torch.no_grad():
        got, want = (attend_stored(q, [one], impl=impl).out for impl in ("native", "reference"))
        error = float((got - want).norm() / want.norm())
        assert error < 1e-4, f"{format}, {form}: the kernel differs from its definition by {error}"
        seconds = least(works)
    return {
        "format": format,
        "form": form,
        "queries a key": queries,
        "tokens": tokens,
        "bytes": size,
        "seconds": seconds,
        "of bandwidth": seconds["reading"] / seconds["stored"],
        "error": error,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=RESULTS / "stored_decode.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {"settings": {name: getattr(options, name) for name in SETTINGS}}
    record |= {"machine": machine.describe(), "cases": []}
    for queries in (1, 4):
        for format in FORMATS:
            for form in FORMS:
                one = case(format, form, queries, options)
                record["cases"].append(one)
                rate = one["bytes"] / one["seconds"]["stored"] / 1e9
                faster = one["seconds"]["dequantised"] / one["seconds"]["stored"]
                print(
                    f"{format:9} {form:11} {queries} queries  {rate:6.2f} GB/s = {one['of bandwidth']:.2f} of reading,"
                    f" {faster:.1f} times as fast as making floats first",
                    flush=True,
                )
    write_json(options.out, record)


if __name__ == "__main__":
    main()
