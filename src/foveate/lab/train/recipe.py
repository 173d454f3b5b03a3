"""What a training run does, as one frozen value saved beside the model it made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ANEW = "take another folder, or begin anew (--no-resume; resume=False in Python)"


def read_recipe(file: Path) -> Recipe:
    """The recipe of a run; ValueError for a file that holds none."""
    try:
        return Recipe.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not the recipe of a run ({error}): {ANEW}") from None


@dataclass(frozen=True)
class Phase:
    """One stretch of the curriculum, up to `until` (a fraction of the run).

    `repeat` is the share of rows in which one span is copied to a later place: it teaches copying from far
    back in hundreds of steps instead of thousands.
    """

    until: float
    context: int
    batch: int
    repeat: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A model's shape, its data, its optimiser and its curriculum.

    >>> Recipe.builtin().context
    8192
    """

    vocab: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 688
    context: int = 8192
    rope_theta: float = 100_000.0

    steps: int = 5000
    minutes: float | None = None
    warmup: int = 60
    hold: float = 0.4
    muon_lr: float = 0.02
    muon_decay: float = 0.02
    adam_lr: float = 0.003
    clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    threads: int = 2
    max_bytes_per_source: int = 8_000_000
    sources: tuple[str, ...] | None = None
    phases: tuple[Phase, ...] = (Phase(1.0, 1024, 8),)

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(ends) or ends[-1] != 1.0:
            raise ValueError(f"phases must follow each other up to 1.0, got ends at {ends}")
        longest = max(phase.context for phase in self.phases)
        if longest > self.context:
            raise ValueError(f"a phase of {longest} tokens needs a context of as many, got context={self.context}")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            sizes = f"hidden={self.hidden}, heads={self.heads}, kv_heads={self.kv_heads}"
            raise ValueError(f"heads must divide hidden, and kv_heads must divide heads, got {sizes}")
        if self.sources is not None and "cpython" not in self.sources:
            raise ValueError(f"held-out text is the standard library's: name 'cpython' too, got {self.sources}")

    @classmethod
    def builtin(cls) -> Recipe:
        """What produced the weights that ship with Foveate: about 100 minutes on two shared CPU cores."""
        curriculum = (
            Phase(0.10, 512, 8, repeat=0.5),
            Phase(0.40, 1024, 4, repeat=0.2),
            Phase(0.62, 2048, 4, repeat=0.1),
            Phase(0.86, 4096, 2, repeat=0.1),
            Phase(1.00, 8192, 1),
        )
        return cls(steps=20_000, minutes=100, phases=curriculum)

    @classmethod
    def tiny(cls) -> Recipe:
        """A model of a few thousand parameters, trained in seconds: for tests and first tries."""
        curriculum = (Phase(0.5, 37, 3, repeat=0.5), Phase(1.0, 65, 2))
        shape = cls(
            vocab=300, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48, context=256, phases=curriculum
        )
        schedule = replace(shape, steps=8, warmup=2, bf16=False, threads=1)
        return replace(schedule, max_bytes_per_source=60_000, sources=("cpython",))

    def phase(self, progress: float) -> Phase:
        """The phase that a run is in after this fraction of it."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])

    def rate(self, step: int, progress: float) -> float:
        """The learning rate's factor: linear warm-up, a plateau, a linear decay to a hundredth."""
        warm = min(1.0, (step + 1) / self.warmup)
        decayed = (1 - progress) / (1 - self.hold)
        return warm * max(0.01, min(1.0, decayed))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        fields: dict[str, Any] = json.loads(text)
        phases = tuple(Phase(**phase) for phase in fields.pop("phases"))
        sources = fields.pop("sources")
        return cls(**fields, phases=phases, sources=tuple(sources) if sources else None)
