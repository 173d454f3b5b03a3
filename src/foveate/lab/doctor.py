"""What runs on this machine: every implementation is tried on small calls and held against the definition."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from foveate import __version__
from foveate.kernels.cpu import loader
from foveate.kernels.cpu.loader import Status
from foveate.kernels.cpu.variants import BY_NAME
from foveate.lab.measure import machine

EXTRAS = {
    "hf": ("transformers", "tokenizers", "safetensors"),
    "report": ("matplotlib",),
    "peers": ("flash-linear-attention", "natten"),
}
ORIGINS = {"package": "from the package", "cache": "from the cache", "compiled": "just compiled"}
# What may be set, and to what; none: it is looked at where it is used.
VARIABLES: dict[str, tuple[str, ...]] = {
    "FOVEATE_ISA": (),
    "FOVEATE_NO_JIT": ("", "0", "1"),
    "FOVEATE_SANITIZE": ("", "0", "1"),
    "FOVEATE_DEBUG": ("", "0", "1"),
    "FOVEATE_PRODUCTS": ("", "torch", "onednn"),
    "FOVEATE_VARIANTS": ("", "all"),
    "FOVEATE_SEED": (),
}
LENGTH = 130
TOLERANCE = 5e-4  # outputs are about 1; float32 on any device

Verdict = Literal["runs", "does not run", "disagrees"]


@dataclass(frozen=True)
class Trial:
    """One implementation on one call."""

    operator: str
    implementation: str
    device: str
    call: str
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class Extra:
    """An optional part of the package: what of it is here, what is missing, and how to get it."""

    name: str
    present: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        return f"pip install 'foveate[{self.name}]'"


@dataclass(frozen=True)
class Report:
    """What `foveate doctor` prints."""

    machine: dict[str, Any]
    native: Status
    trials: tuple[Trial, ...]
    extras: tuple[Extra, ...]

    @property
    def disagreements(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.verdict == "disagrees")

    def to_json(self) -> str:
        extras = [asdict(extra) | {"command": extra.command} for extra in self.extras]
        native = asdict(self.native) | {"skipped": dict(self.native.skipped)}
        trials = [asdict(trial) for trial in self.trials]
        report = {"machine": self.machine, "native": native, "trials": trials, "extras": extras}
        return json.dumps(report, indent=2)


def check_environment() -> None:
    """ValueError for a variable of ours that is set to something without a meaning, or misspelt."""
    for name in filter(lambda name: name.startswith("FOVEATE_"), os.environ):
        if name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            raise ValueError(f"{name} means nothing here{f': did you mean {near[0]}?' if near else ''}")
        known = VARIABLES[name]
        if known and os.environ[name] not in known:
            possible = ", ".join(value for value in known if value)
            raise ValueError(f"{name}={os.environ[name]}: possible are {possible}, or nothing at all")


def examine() -> Report:
    """Look at the machine, try every implementation, and see which extras are installed.

    >>> report = examine()
    >>> report.disagreements
    ()
    """
    check_environment()
    return Report(machine.describe() | versions(), loader.status(), tuple(_trials()), extras())


def versions() -> dict[str, str | None]:
    """Versions of what is used where it is there."""
    return {"foveate": __version__} | {name: _version(name) for name in ("numpy", "transformers", "triton")}


def kernels(status: Status) -> Iterator[tuple[str, str]]:
    """Each variant of the native kernels, and what became of it.

    >>> dict(kernels(Status("avx512", "avx512.so", "package", skipped=(("amx", "no tiles"),))))["avx2"]
    'not needed: avx512 is in use'
    """
    skipped = dict(status.skipped)
    for name in BY_NAME:
        if name == status.isa and status.origin:
            yield name, "; ".join((f"in use, {ORIGINS[status.origin]}: {status.path}", *status.cautions))
        elif name in skipped:
            yield name, skipped[name]
        else:
            yield name, f"not needed: {status.isa} is in use" if status.isa else status.reason or ""


def extras() -> tuple[Extra, ...]:
    """Which extras are complete."""
    found = []
    for name, packages in EXTRAS.items():
        present = tuple(package for package in packages if _version(package))
        found.append(Extra(name, present, tuple(package for package in packages if package not in present)))
    return tuple(found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _trials() -> Iterator[Trial]:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        q, k, v = _inputs(device)
        yield from try_attend(q, k, v)
        yield from try_recur(q, k, v)
        yield from try_scan(v[:, 0])


def try_attend(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Trial]:
    """Every implementation of attend on a few kinds of calls."""
    from foveate.attention import IMPLEMENTATIONS, attend, sigmoid
    from foveate.patterns import causal, window

    calls: dict[str, dict[str, Any]] = {
        "causal": {"pattern": causal},
        "window": {"pattern": window(16) & causal},
        "sigmoid weights": {"weights": sigmoid(bias=-4.0)},
        "soft-cap": {"pattern": causal, "softcap": 20.0},
    }
    for name in IMPLEMENTATIONS:
        for call, options in calls.items():
            yield _try("attend", name, q.device.type, call, partial(attend, q, k, v, **options))


def try_recur(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Trial]:
    """Every implementation of recur with each of its updates."""
    from foveate.recurrence import IMPLEMENTATIONS, recur

    k = torch.nn.functional.normalize(k, dim=-1)
    calls: dict[str, dict[str, Any]] = {
        "decay per head": {"decay": torch.tensor([-0.1, -0.01], device=q.device)},
        "delta rule": {"beta": torch.full((1, 2, LENGTH), 0.5, device=q.device)},
        "low rank": {"low_rank": (-k, 0.5 * k)},
    }

    def run(**options: Any) -> Tensor:
        return recur(q, k, v, **options).out

    for name in IMPLEMENTATIONS:
        for call, options in calls.items():
            yield _try("recur", name, q.device.type, call, partial(run, **options))


def try_scan(x: Tensor) -> Iterator[Trial]:
    """Every implementation of the selective scan on tokens x (B, N, C)."""
    from foveate.recurrence import IMPLEMENTATIONS, scan

    rates, read = -torch.arange(1.0, 5.0, device=x.device).expand(x.shape[2], 4), x[..., :4]

    def run(**options: Any) -> Tensor:
        return scan(x, x, rates, read, read, softplus=True, **options).out

    for name in IMPLEMENTATIONS:
        yield _try("scan", name, x.device.type, "selective", run)


def _inputs(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, LENGTH, 16, generator=generator).to(device) for _ in range(3)]


def _try(operator: str, name: str, device: str, call: str, run: Callable[..., Tensor]) -> Trial:
    try:
        got = run(impl=name)
    except NotImplementedError as refused:
        reason = str(refused)
        return Trial(operator, name, device, call, "does not run", reason.partition(": ")[2] or reason)
    error = (got - run(impl="reference")).abs().max().item()
    if error <= TOLERANCE:
        return Trial(operator, name, device, call, "runs")
    return Trial(operator, name, device, call, "disagrees", f"differs from the definition by {error:.1e}")
