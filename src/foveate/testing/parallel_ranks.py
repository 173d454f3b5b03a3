"""One process of check_parallel: it joins the others, and computes its part in every group that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 4
PATIENCE = timedelta(seconds=60)


class Job(NamedTuple):
    """A group of ranks, the inputs of each, and the gradients of their results."""

    ranks: tuple[int, ...]
    inputs: list[tuple[Tensor, ...]]
    cotangents: list[Tensor]


def run_rank(
    rank: int, folder: str, function: Callable[..., Any], options: dict[str, Any], jobs: list[Job], seed: int
) -> None:
    """Compute the jobs that this rank has a part in, and write what came of them into the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=PATIENCE)
    for number, job in enumerate(jobs):
        group = dist.new_group(list(job.ranks), timeout=PATIENCE)
        if rank in job.ranks:
            torch.save(
                _part(function, options, job, job.ranks.index(rank), group), Path(folder) / f"{number}-{rank}.pt"
            )
    dist.barrier()
    dist.destroy_process_group()


def _part(function: Callable[..., Any], options: dict[str, Any], job: Job, place: int, group: Any) -> dict[str, Any]:
    inputs = [one.clone().requires_grad_() for one in job.inputs[place]]
    try:
        out = function(*inputs, group=group, **options)
        gradients = torch.autograd.grad(out, inputs, job.cotangents[place], allow_unused=True)
    except Exception as error:
        return {"error": f"rank {job.ranks[place]} raised {type(error).__name__}: {error}"}
    pairs = zip(gradients, inputs, strict=True)
    found = [torch.zeros_like(one) if gradient is None else gradient for gradient, one in pairs]
    return {"out": out.detach().clone(), "gradients": found}
