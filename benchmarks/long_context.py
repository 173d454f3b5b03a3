"""The papers' headline ratios for long contexts beside ours, at the density and the length that each was given for.

    python -m benchmarks.long_context                        some minutes of one thread
    python -m benchmarks.long_context --lengths 16384 32768 65536

Ratios are dense attention's time over the mechanism's, choosing included: CPU seconds of one thread, the least of runs
by turns, on random queries, keys and values of 64 channels, float32. Lengths beyond ``--lengths`` are not run: budgets
are scaled so that the density is that at the paper's length (NSA's and HyperAttention's are the paper's, and their
density falls), times are fitted by a * length ** p, both exponents are printed, and the ratio at the paper's length is
the fits', but at most 1 / density. Papers measured on GPUs, mostly against FlashAttention-2, some of them whole models;
the rows say which. StreamingLLM's is a token written with the built-in model, beside reading its window anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.contest import RESULTS, write_json
from benchmarks.nsa_cpu import prefilled
from foveate import attend, causal, sinks, topk_blocks, vertical_slash, window
from foveate.adapt import use
from foveate.catalogue.registry import mixer as made
from foveate.counting import count_operations
from foveate.lab.decode.measure import Text, twin
from foveate.lab.measure import machine
from foveate.mixers.core import PatternCore
from foveate.mixers.dynamic_sparse.hyper import HyperCore
from foveate.mixers.static_sparse.delta_attention import DeltaCore
from foveate.models import builtin
from foveate.patterns import full
from foveate.patterns.rules.radial import radial

HEADS, DIM, FRAMES = 2, 64, 32
MILLION = 1 << 20
Run = Callable[[], Any]


@dataclass(frozen=True)
class Claim:
    """A ratio of a paper: how much faster at which length, of what, and the runs that measure ours."""

    paper: str
    ratio: str
    length: int
    of: str  # what the paper measured
    ours: str  # what is measured here
    runs: Callable[[int], tuple[Run, Run]]  # dense and sparse, at a length
    lengths: tuple[int, ...] = ()  # instead of those asked for
    falls: bool = False  # whether its density falls with the length, budgets being those of the paper


@dataclass(frozen=True)
class Line:
    """What was found: seconds at each length, the fits' exponents, and the ratio at the paper's length."""

    paper: str
    ratio: str
    length: int
    of: str
    ours: str
    lengths: tuple[int, ...]
    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    densities: tuple[float | None, ...]
    exponents: tuple[float, float]
    at_length: float
    measured: bool


def drawn(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    q, k, v = torch.randn(3, 1, HEADS, length, DIM, generator=generator)
    return q, k, v


def beside_causal(core: Callable[[int], Any]) -> Callable[[int], tuple[Run, Run]]:
    """A core of a length beside causal attention."""

    def runs(length: int) -> tuple[Run, Run]:
        q, k, v = drawn(length)
        return partial(attend, q, k, v, causal), partial(core(length), q, k, v, within=causal)

    return runs


def moba(length: int) -> PatternCore:
    """12 blocks of 4096 among a million tokens: blocks shrink with the length."""
    return PatternCore(topk_blocks(max(16, 4096 * length // MILLION), 12))


def minference(length: int) -> PatternCore:
    """1000 keys and 6096 distances among a million tokens."""
    keys, distances = (max(4, size * length // MILLION) for size in (1000, 6096))
    return PatternCore(vertical_slash(keys, distances, first=min(30, keys), near=min(30, distances)))


def sparge(length: int) -> PatternCore:
    """Blocks of queries choose 46 % of their blocks of keys, by mean queries and keys; no numbers of few bits."""
    return PatternCore(topk_blocks(64, max(1, round(0.46 * length / 2 / 64)), per="block"))


def delta(length: int) -> DeltaCore:
    """Sinks and a window of 2048 among a million tokens, every 64th query full."""
    return DeltaCore(PatternCore(window(max(16, 2048 * length // MILLION), 0) | sinks(4)), stride=64)


def video(length: int) -> tuple[Run, Run]:
    q, k, v = drawn(length)
    pattern = radial(FRAMES, length // FRAMES, block=64)
    return partial(attend, q, k, v, full), partial(attend, q, k, v, pattern)


def nsa(length: int) -> tuple[Run, Run]:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 1}
    x = torch.randn(1, length, 4 * DIM)
    dense = made("flash_attention", 4 * DIM, causal=True, **sizes).eval()
    return prefilled(dense, x), prefilled(made("nsa", 4 * DIM, **sizes).eval(), x)


def streaming(length: int) -> tuple[Run, Run]:
    """A token: the window read anew, or one step of the cache of sinks and latest tokens."""
    model, _ = builtin.load()
    streams = twin(model)
    use(streams, f"attention_sinks(sinks=4, window={length - 4})")
    ids = torch.randint(50, 1000, (length + 40,), generator=torch.Generator().manual_seed(2))
    text = Text(streams, ids, length + 1)
    with torch.inference_mode():
        text.read()

    @torch.inference_mode()
    def recomputed() -> Tensor:
        return model(ids[None, :length], use_cache=False, logits_to_keep=1).logits

    @torch.inference_mode()
    def step() -> Tensor:
        return text.step()

    return recomputed, step


CLAIMS = (
    Claim("NSA", "9.0", 1 << 16, "forward kernel, A100, against FlashAttention-2 in Triton",
          "whole mixers of the paper's blocks, 4 query heads to a key head, projections included", nsa,
          falls=True),
    Claim("HyperAttention", "5", 1 << 17, "one causal layer, A100", "blocks of 256 and 256 samples, 4096 exact",
          beside_causal(lambda _: HyperCore()), lengths=(8192, 16384), falls=True),
    Claim("SpargeAttn", "2.5 to 5", 1 << 17, "kernels with 8-bit products, several models",
          "46 % of causal blocks, chosen; float32 (the density is not verified)", beside_causal(sparge)),
    Claim("Radial Attention", "3.7", 128 * 3600, "a whole video model at 4 times its length",
          f"{FRAMES} frames, blocks of 64, attention alone", video),
    Claim("MoBA", "6.5", MILLION, "attention of a layer, against FlashAttention",
          "12 of 256 blocks a query", beside_causal(moba)),
    Claim("MInference", "10", MILLION, "prefill of a whole model, A100",
          "1000 keys and 6096 distances in a million, chosen by the last 64 queries", beside_causal(minference)),
    Claim("Delta Attention", "32", MILLION, "prefill attention, against FlashAttention-2",
          "sinks, a window of 2048 in a million, every 64th query full", beside_causal(delta)),
    Claim("StreamingLLM", "22.2", 4096, "a token of a whole model, against a window read anew",
          "the built-in model", streaming, lengths=(512, 1024, 2048)),
)  # fmt: skip


def measured(claim: Claim, lengths: Sequence[int], repeats: int, tick: Run) -> Line:
    times: list[tuple[float, float]] = []
    densities: list[float | None] = []
    for length in lengths:
        runs = claim.runs(length)
        with torch.no_grad():
            densities.append(density(runs))
            least = [math.inf, math.inf]
            for _ in range(repeats):
                for side, run in enumerate(runs):
                    least[side] = min(least[side], seconds(run))
                tick()
        times.append((least[0], least[1]))
    dense, sparse = (tuple(pair[side] for pair in times) for side in (0, 1))
    exponents = fitted(lengths, dense)[0], fitted(lengths, sparse)[0]
    ratio = ratio_at(claim, lengths, dense, sparse, densities)
    return Line(
        claim.paper, claim.ratio, claim.length, claim.of, claim.ours, tuple(lengths), dense, sparse,
        tuple(densities), exponents, ratio, claim.length in lengths,
    )  # fmt: skip


def ratio_at(
    claim: Claim,
    lengths: Sequence[int],
    dense: Sequence[float],
    sparse: Sequence[float],
    densities: Sequence[float | None],
) -> float:
    """The ratio at the paper's length: measured, or the fits', never beyond what pairs left out can give.

    Where short lengths are ruled by what does not grow with them, fits alone would promise any ratio.
    """
    length = claim.length
    if length in lengths:
        at = list(lengths).index(length)
        return dense[at] / sparse[at]
    found = math.exp(fitted(lengths, dense)[1](length) - fitted(lengths, sparse)[1](length))
    known = [one for one in densities if one is not None]
    if len(known) < len(densities):
        return found
    return min(found, math.exp(-fitted(lengths, known)[1](length)) if claim.falls else 1 / min(known))


def density(runs: tuple[Run, Run]) -> float | None:
    """Pairs of the mechanism over those of dense attention; None where these are not counted."""
    counts = []
    for run in runs:
        with count_operations(torch_too=False) as counted:
            run()
        counts.append(counted.pairs)
    return counts[1] / counts[0] if counts[0] else None


def seconds(run: Run) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def fitted(lengths: Sequence[int], times: Sequence[float]) -> tuple[float, Callable[[float], float]]:
    """The exponent p of times a * length ** p, least squares in logarithms, and the logarithm of the fit."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (lengths, times))
    p = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()) if len(lengths) > 1 else 2.0
    middle, level = float(x.mean()), float(y.mean())
    return p, lambda length: level + p * (math.log(length) - middle)


def show(lines: Sequence[Line]) -> None:
    table = Table(title="Dense attention's time over the mechanism's", caption=machine.in_words())
    for column in ("paper", "of", "at", "the paper's", "ours", "how", "measured", "density", "exponents"):
        table.add_column(column, justify="left" if column in ("paper", "of", "how") else "right")
    for line in lines:
        ratios = [f"{d / s:.1f} at {short(n)}" for n, d, s in zip(line.lengths, line.dense, line.sparse, strict=True)]
        how = "measured" if line.measured else "extrapolated"
        seen = "-" if line.densities[-1] is None else f"{line.densities[-1]:.1%}"
        exponents = " / ".join(f"{p:.2f}" for p in line.exponents)
        table.add_row(line.paper, line.of, short(line.length), f"{line.ratio}x", f"{line.at_length:.1f}x",
                      f"{how}: {line.ours}", "\n".join(ratios), seen, exponents)  # fmt: skip
    Console(width=150).print(table)


def short(length: int) -> str:
    return f"{length // MILLION}M" if length % MILLION == 0 else f"{length / 1024:.3g}k"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--paper", nargs="+", default=[claim.paper for claim in CLAIMS], help="some of the papers")
    parser.add_argument("--keep", action="store_true", help="keep what --out has of other papers")
    parser.add_argument("--out", type=Path, default=RESULTS / "long_context.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [(claim, list(claim.lengths or options.lengths)) for claim in CLAIMS if claim.paper in options.paper]
    if not chosen:
        raise SystemExit(f"papers are {', '.join(claim.paper for claim in CLAIMS)}; got {', '.join(options.paper)}")
    settings = {"lengths": options.lengths, "repeats": options.repeats, "heads": HEADS, "dim": DIM, "threads": 1}
    lines = kept(options.out, settings) if options.keep else {}
    with Progress(transient=True) as progress:
        for claim, lengths in chosen:
            task = progress.add_task(claim.paper, total=options.repeats * len(lengths))
            lines[claim.paper] = measured(claim, lengths, options.repeats, partial(progress.advance, task))
            record = {"settings": settings, "machine": machine.describe(), "load": os.getloadavg()[0]}
            write_json(options.out, record | {"lines": [asdict(line) for line in lines.values()]})
    show(list(lines.values()))
    print("written to", options.out)


def kept(file: Path, settings: dict[str, Any]) -> dict[str, Line]:
    """Lines of a file that were measured with the same settings, by their papers."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {one["paper"]: Line(**one) for one in record.get("lines", ()) if record["settings"] == settings}


if __name__ == "__main__":
    main()
