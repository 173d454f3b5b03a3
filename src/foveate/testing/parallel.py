"""check_parallel: what every computation over a process group must hold to, on four processes of this machine."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.catalogue.tiers import ParallelRow
from foveate.testing.parallel_ranks import WORLD, Job, run_rank
from foveate.testing.report import Report, Skip, fresh_seed
from foveate.testing.suite import Property, assert_equal, row_of, run_suite

EVEN, UNEVEN = 24, 31
GROUPS: dict[str, tuple[int, ...]] = {
    "two ranks": (0, 1),
    "three ranks": (0, 1, 2),
    "four ranks": (0, 1, 2, 3),
    "other ranks": (1, 3),
}


class Whole(NamedTuple):
    """Inputs, result, the result's gradient, and the gradients of the inputs, of one device."""

    inputs: tuple[Tensor, ...]
    out: Tensor
    cotangent: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class ParallelSubject:
    """A computation, and what every rank made of it, by group and length."""

    row: ParallelRow
    wholes: Mapping[int, Whole]
    results: Mapping[tuple[tuple[int, ...], int], list[dict[str, Any]]]

    def check_values(self, ranks: tuple[int, ...], length: int = EVEN) -> None:
        outs = [rank["out"] for rank in self.of(ranks, length)]
        expected, axis = self.wholes[length].out, self.row.out
        if axis is not None:
            assert_equal(torch.cat(outs, axis), expected, f"the ranks' results, {length} tokens in all")
            return
        for rank, out in zip(ranks, outs, strict=True):
            assert_equal(out, expected, f"the result of rank {rank}")

    def check_gradients(self, ranks: tuple[int, ...], length: int = EVEN) -> None:
        found = self.of(ranks, length)
        for number, (axis, expected) in enumerate(zip(self.row.axes, self.wholes[length].gradients, strict=True)):
            parts = [rank["gradients"][number] for rank in found]
            joined = sum(parts) if axis is None else torch.cat(parts, axis)
            assert isinstance(joined, Tensor)
            assert_equal(joined, expected, f"gradients of input {number}, on {len(ranks)} ranks")

    def of(self, ranks: tuple[int, ...], length: int) -> list[dict[str, Any]]:
        found = self.results[ranks, length]
        errors = [rank["error"] for rank in found if "error" in rank]
        first = next((error for error in errors if "Connection" not in error), errors[0] if errors else "")
        assert not errors, first
        return found


def check_parallel(
    computation: ParallelRow | str | Callable[..., Any], *, seed: int | None = None, raise_on_failure: bool = True
) -> Report:
    """Put a computation over a process group to every property that such hold to.

    Four processes (gloo) compute in groups of 2, 3 and 4, and in one whose ranks are not the first: each gets its part
    of the inputs, and together they must give what one device gives, values and gradients. Of an input that every rank
    has whole, the gradients add up; of a result that every rank has whole, the first rank's counts. Processes start
    afresh (``forkserver``): a script calls this under ``if __name__ == "__main__":``.

    Args:
        computation: its row, its name or the function, which must be a module's own, not one inside another.
        seed: of all random numbers; a fresh one by default. Every failure names it.
        raise_on_failure: whether a failure raises, or is only reported.

    Raises AssertionError naming each property that fails, with the numbers and the seed; TypeError for what is no
    parallel computation of the catalogue.
    """
    row = row_of(computation, ParallelRow, "check_parallel")
    seed = fresh_seed() if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wholes = {length: _whole(row, length) for length in ((EVEN, UNEVEN) if row.uneven else (EVEN,))}
    subject = ParallelSubject(row, wholes, _results(row, wholes, seed))
    return run_suite(row.name, subject, PROPERTIES, exempt=row.exempt, seed=seed, raise_on_failure=raise_on_failure)


def _whole(row: ParallelRow, length: int) -> Whole:
    inputs = tuple(one.double().requires_grad_() for one in row.inputs(length))
    out = row.whole(*inputs, **row.tiny)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    return Whole(tuple(one.detach() for one in inputs), out.detach(), cotangent, gradients)


def _results(
    row: ParallelRow, wholes: Mapping[int, Whole], seed: int
) -> dict[tuple[tuple[int, ...], int], list[dict[str, Any]]]:
    """What each rank of each group says, all computed by the same four processes."""
    groups = [(ranks, length) for length in wholes for ranks in GROUPS.values()]
    try:
        pickle.dumps(row.function)
    except (pickle.PicklingError, AttributeError) as error:
        raise ValueError(f"{row.name} must be a function of a module, for processes to import it ({error})") from None
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_job(row, wholes[length], ranks) for ranks, length in groups]
        _start(folder, row.function, dict(row.tiny), jobs, seed)
        return {group: [_read(folder, number, rank) for rank in group[0]] for number, group in enumerate(groups)}


def _job(row: ParallelRow, whole: Whole, ranks: tuple[int, ...]) -> Job:
    """Each rank's part of the inputs, and of the result's gradient: of a result that all have, the first's counts."""
    inputs = [_shards(one, axis, len(ranks)) for one, axis in zip(whole.inputs, row.axes, strict=True)]
    cotangents = _shards(whole.cotangent, row.out, len(ranks))
    if row.out is None:
        cotangents = [cotangents[0], *(torch.zeros_like(one) for one in cotangents[1:])]
    return Job(ranks, list(zip(*inputs, strict=True)), cotangents)


def _shards(whole: Tensor, axis: int | None, ranks: int) -> list[Tensor]:
    if axis is None:
        return [whole] * ranks
    return [part.contiguous() for part in whole.tensor_split(ranks, axis)]


def _start(folder: str, function: Callable[..., Any], options: dict[str, Any], jobs: list[Job], seed: int) -> None:
    """Run the jobs on four processes, and wait for these."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foveate.testing.parallel_ranks"])
    ranks = [
        context.Process(target=run_rank, args=(rank, folder, function, options, jobs, seed)) for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


def _read(folder: str, number: int, rank: int) -> dict[str, Any]:
    path = Path(folder) / f"{number}-{rank}.pt"
    if not path.exists():
        return {"error": f"rank {rank} gave no result: a group before it failed, or the process ended"}
    return torch.load(path, weights_only=True)


def _values(name: str) -> Callable[[ParallelSubject], None]:
    def values(subject: ParallelSubject) -> None:
        """The ranks of a group together give what one device gives."""
        subject.check_values(GROUPS[name])

    return values


def gradients(subject: ParallelSubject) -> None:
    """Gradients are those of one device, in every group whose values are."""
    checked = 0
    for ranks in GROUPS.values():
        try:
            subject.check_values(ranks)
        except AssertionError:  # which the property of this group tells of
            continue
        subject.check_gradients(ranks)
        checked += 1
    if not checked:
        raise Skip("no group gives the right values")


def uneven(subject: ParallelSubject) -> None:
    """Parts of unequal length give what one device gives, values and gradients."""
    if not subject.row.uneven:
        raise Skip("it claims parts of equal length only")
    for ranks in GROUPS.values():
        subject.check_values(ranks, UNEVEN)
        subject.check_gradients(ranks, UNEVEN)


PROPERTIES = (
    *(Property(name, _values(name)) for name in GROUPS),
    Property("gradients", gradients),
    Property("uneven parts", uneven),
)
