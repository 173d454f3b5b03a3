"""check_model: what every model of the catalogue must hold to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue.tiers import Input, ModelRow
from foveate.testing.report import Report, Skip
from foveate.testing.suite import Property, assert_equal, row_of, run_suite, same_bits

SIZES = (19, 33)  # odd, and too small for nothing
KNOWN_TOKENS, DRAWS = 16, 3
SAMPLES: dict[Input, Callable[[int, int, ModelRow], Tensor]] = {
    "tokens": lambda batch, size, row: torch.randint(KNOWN_TOKENS, (batch, size)),
    "vectors": lambda batch, size, row: torch.randn(batch, size, row.tiny.get("dim", 16)),
    "image": lambda batch, size, row: torch.randn(batch, _channels(row), size, size + 5),
    "video": lambda batch, size, row: torch.randn(batch, _channels(row), 5, size, size + 5),
    "points": lambda batch, size, row: torch.randn(batch, 3 * size, 3),
    "audio": lambda batch, size, row: torch.randn(batch, 50 * size),
}


@dataclass(frozen=True)
class ModelSubject:
    """A model at the sizes of tests, in float64."""

    row: ModelRow

    def model(self) -> nn.Module:
        """Build it; no parameter stays at a special value such as zero."""
        model = self.row.make(**self.row.tiny).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def sample(self, batch: int, size: int = SIZES[0]) -> Tensor:
        """An input of the model's kind."""
        made = self.row.sample(batch, size) if self.row.sample else SAMPLES[self.row.inputs](batch, size, self.row)
        return made.double() if made.is_floating_point() else made

    def needs(self, feature: Any) -> None:
        if feature not in self.row.supports:
            raise Skip(f"it does not claim {feature!r}")


def check_model(
    model: ModelRow | str | Callable[..., nn.Module], *, seed: int | None = None, raise_on_failure: bool = True
) -> Report:
    """Put a model of the catalogue to every property that models hold to, at the sizes of its ``tiny``.

    >>> print(check_model("swiftformer", seed=0))
    swiftformer: 6 passed, 2 skipped (seed=0)

    Odd sizes run; gradients reach every parameter; what is saved (safetensors) and loaded computes the same bits; no
    batch entry looks at another, in eval mode; presets have their papers' parameters within 2 %; ``features`` are maps
    for each entry that learn; decoding equals the whole, and no later token reaches an output.

    Args:
        model: its row, its name or the function that makes it.
        seed: of all random numbers; a fresh one by default. Every failure names it.
        raise_on_failure: whether a failure raises, or is only reported.

    Raises AssertionError naming each property that fails, with the numbers and the seed; TypeError for what is no
    model of the catalogue.
    """
    row = row_of(model, ModelRow, "check_model")
    return run_suite(
        row.name, ModelSubject(row), PROPERTIES, exempt=row.exempt, seed=seed, raise_on_failure=raise_on_failure
    )


@torch.no_grad()
def odd_sizes(subject: ModelSubject) -> None:
    """Inputs of any size and batch give finite numbers, a result for each batch entry."""
    model = subject.model()
    for batch, size in ((1, SIZES[0]), (3, SIZES[1])):
        out = model(subject.sample(batch, size))
        assert isinstance(out, Tensor), f"a model returns a tensor; got {type(out).__name__}"
        assert out.shape[:1] == (batch,), f"{batch} inputs of size {size} give {tuple(out.shape)}"
        assert out.isfinite().all(), f"size {size}: not all numbers are finite"


def gradients(subject: ModelSubject) -> None:
    """Every parameter learns: of those that rest (all that a ReLU lets through may be 0), none does in three draws."""
    idle: set[str] | None = None
    for _ in range(DRAWS):
        model = subject.model()
        out = model(subject.sample(3, SIZES[1]))
        (out * torch.randn_like(out)).sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        wild = [name for name, grad in found.items() if grad is not None and not grad.isfinite().all()]
        assert not wild, f"gradients are not finite of {', '.join(wild)}"
        resting = {name for name, grad in found.items() if grad is None or not grad.any()}
        idle = resting if idle is None else idle & resting
        if not idle:
            return
    assert not idle, f"no gradient reaches {', '.join(sorted(idle or ()))}"


@torch.no_grad()
def save_and_load(subject: ModelSubject) -> None:
    """What is saved and loaded into another model of these sizes computes the same bits."""
    try:
        from safetensors.torch import load_model, save_model
    except ImportError:
        raise Skip("safetensors is not installed") from None
    first, second, x = subject.model(), subject.model(), subject.sample(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(first, str(path))
        missing, unexpected = load_model(second, str(path))
    assert not missing and not unexpected, f"missing {missing}, unexpected {unexpected}"
    assert same_bits(second(x), first(x)), "what was loaded computes other numbers"


@torch.no_grad()
def neighbours(subject: ModelSubject) -> None:
    """In eval mode a batch entry is what it would be alone."""
    model, x = subject.model(), subject.sample(3)
    together = model(x)
    for entry in range(3):
        assert_equal(together[entry : entry + 1], model(x[entry : entry + 1]), f"entry {entry} alone")


def presets(subject: ModelSubject) -> None:
    """The paper's sizes have the paper's number of parameters, within 2 %."""
    told = {name: preset.parameters for name, preset in subject.row.presets.items() if preset.parameters is not None}
    if not told:
        raise Skip("no preset says how many parameters its paper counts")
    wrong = []
    for name, expected in told.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in subject.row.make(name).parameters())
        if abs(count / expected - 1) > 0.02:
            wrong.append(f"{name} has {count / 1e6:.2f} million, not {expected / 1e6:.2f}")
    assert not wrong, "; ".join(wrong)


def features(subject: ModelSubject) -> None:
    """``features`` are maps (B, C, ...), finite, through which the input learns, an entry apart from the others."""
    subject.needs("features")
    model, x = subject.model(), subject.sample(2)
    inputs = x.requires_grad_() if x.is_floating_point() else x
    maps = model.features(inputs)  # type: ignore[operator]
    assert len(maps), "there are no maps"
    alone = model.features(x[:1])  # type: ignore[operator]
    for number, (one, own) in enumerate(zip(maps, alone, strict=True)):
        assert one.dim() >= 3 and one.shape[0] == 2, f"map {number} is {tuple(one.shape)}, not (B, C, ...)"
        assert one.isfinite().all(), f"map {number}: not all numbers are finite"
        assert one.requires_grad, f"map {number} is cut off from the parameters"
        assert_equal(one[:1], own, f"map {number} of the first entry alone")


@torch.no_grad()
def decoding(subject: ModelSubject) -> None:
    """A prompt and then token by token gives what the whole gives."""
    subject.needs("decode")
    model: Any = subject.model()
    x, prompt = subject.sample(2), SIZES[0] // 2
    whole = model(x)
    out, state = model.prefill(x[:, :prompt], model.init_state(2))
    assert_equal(out, whole[:, :prompt], "the prompt")
    for at in range(prompt, x.shape[1]):
        out, state = model.decode(x[:, at : at + 1], state)
        assert_equal(out, whole[:, at : at + 1], f"token {at}")


@torch.no_grad()
def causality(subject: ModelSubject) -> None:
    """No later token reaches an output."""
    subject.needs("decode")
    model, x, other = subject.model(), subject.sample(2), subject.sample(2)
    at = SIZES[0] // 2
    changed = torch.cat((x[:, :at], other[:, at:]), 1)
    assert_equal(model(changed)[:, :at], model(x)[:, :at], f"outputs before token {at}, when later tokens change")


def _channels(row: ModelRow) -> int:
    return row.tiny.get("channels", 3)


PROPERTIES = (
    Property("odd sizes", odd_sizes),
    Property("gradients", gradients),
    Property("save and load", save_and_load),
    Property("neighbours", neighbours),
    Property("presets", presets),
    Property("features", features),
    Property("decoding", decoding),
    Property("causality", causality),
)
