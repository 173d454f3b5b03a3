"""The tiers beside operators: a decorator each, for a function that makes what the tier is about.

A function's docstring begins with what `foveate list` says of it. All names are one set: none may be taken twice, by
whatever tier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

from foveate.catalogue.budget import Budget, budget_of
from foveate.catalogue.namespace import ROWS, TierRow, add, sources

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.catalogue.contracts import Finding, Hook, Method, Page, Recipe
    from foveate.catalogue.index import Use

Made = TypeVar("Made", bound=Callable[..., Any])
Input = Literal["tokens", "vectors", "image", "video", "points", "audio"]
ModelFeature = Literal["decode", "features"]
MethodInput = Literal["tokens", "image", "video"]
USE_OF: dict[str, tuple[Use, ...]] = {
    "image": ("image",),
    "video": ("video",),
    "points": ("points",),
    "audio": ("series",),
}


@dataclass(frozen=True)
class FunctionRow(TierRow):
    """A row whose function makes it: a model, a method, a hook, ...

    ``tiny`` are the arguments of tests: sizes at which everything is fast, budgets at which a few dozen tokens are
    already sparse.
    """

    function: Callable[..., Any]
    tiny: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    uses: tuple[Use, ...] = field(default=(), kw_only=True)
    exempt: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # properties it lacks by design, and why

    @property
    def target(self) -> Any:
        return self.function

    def make(self, **options: Any) -> Any:
        """Call the function; ValueError for options that it does not have."""
        from foveate.catalogue.options import made

        return made(self.name, self.function, options)


@dataclass(frozen=True)
class Preset:
    """A size that a paper gives: arguments of the model's function, and the parameters the paper counts."""

    sizes: Mapping[str, Any] = field(default_factory=dict)
    parameters: float | None = None


@dataclass(frozen=True)
class ModelRow(FunctionRow):
    """A model: ``function(**sizes)`` returns a module that takes inputs of a kind.

    ``sample(batch, size)`` makes inputs at the sizes of ``tiny`` for a model whose inputs are of no usual shape.
    """

    tier: ClassVar[str] = "model"
    inputs: Input = "tokens"
    supports: frozenset[ModelFeature] = frozenset()
    presets: Mapping[str, Preset] = field(default_factory=dict)
    sample: Callable[[int, int], Tensor] | None = None

    def make(self, preset: str | None = None, **sizes: Any) -> nn.Module:
        """Build it, at a preset's sizes or at others.

        >>> row("swiftformer").make(classes=10, dims=(16, 32), depths=(1, 1)).head.out_features
        10
        """
        if preset is not None and preset not in self.presets:
            raise ValueError(f"{self.name} has no preset {preset!r}; it has {', '.join(self.presets) or 'none'}")
        chosen = {} if preset is None else self.presets[preset].sizes
        return super().make(**{**chosen, **sizes})


@dataclass(frozen=True)
class MethodRow(FunctionRow):
    """A method: ``function(**options)`` returns a `Method`, for models of ``inputs``: tokens of text, images, or video.

    ``full_budget`` are options with which, added to ``tiny``, it changes nothing that a model computes; ``keeps`` says
    how many tokens its cache holds at most after n tokens with the options of ``tiny``, where that is bounded.
    """

    tier: ClassVar[str] = "inference"
    full_budget: Mapping[str, Any] | None = None
    keeps: Callable[[int], int] | None = None
    inputs: MethodInput = "tokens"
    budget: Budget | None = None

    def make(self, **options: Any) -> Method:
        return super().make(**options)


@dataclass(frozen=True)
class RecipeRow(FunctionRow):
    """A recipe: ``function(**options)`` returns a `Recipe`; ``teacher()`` and ``batch()`` are small ones to try it on.

    ``inherits`` is the share of the teacher's numbers that the student begins with, at least.
    """

    tier: ClassVar[str] = "recipe"
    teacher: Callable[[], nn.Module]
    batch: Callable[[], Any]
    inherits: float = 0.5

    def make(self, **options: Any) -> Recipe:
        return super().make(**options)


@dataclass(frozen=True)
class ParallelRow(FunctionRow):
    """A computation shared by the ranks of a process group: ``function(*shards, group=..., **options)``.

    ``whole(*inputs, **options)`` is the same on one device, ``inputs(length)`` makes what it takes. ``axes`` says along
    which axis each input is shared out, None for one that every rank has whole; ``out`` the same of the result.
    """

    tier: ClassVar[str] = "distributed"
    whole: Callable[..., Tensor]
    inputs: Callable[[int], tuple[Tensor, ...]]
    axes: tuple[int | None, ...]
    out: int | None = -2
    uneven: bool = False


@dataclass(frozen=True)
class HookRow(FunctionRow):
    """An application: ``function(**sizes)`` returns a `Hook`, at the application's own sizes by default."""

    tier: ClassVar[str] = "hook"

    def make(self, **sizes: Any) -> Hook:
        return super().make(**sizes)


@dataclass(frozen=True)
class ProbeRow(FunctionRow):
    """An experiment: ``function(seed=0, **sizes)`` returns a `Finding`."""

    tier: ClassVar[str] = "probe"

    def run(self, seed: int = 0, **sizes: Any) -> Finding:
        """Try it, at the sizes it has by default or at others."""
        return super().make(seed=seed, **sizes)


@dataclass(frozen=True)
class DocRow(FunctionRow):
    """A survey: ``function()`` returns the `Page` that says which rows it covers."""

    tier: ClassVar[str] = "doc"

    def make(self, **options: Any) -> Page:
        return super().make(**options)


def model(
    name: str,
    *,
    papers: tuple[str, ...] | None,
    inputs: Input,
    presets: Mapping[str, Preset],
    tiny: Mapping[str, Any],
    supports: set[ModelFeature] | None = None,
    uses: tuple[Use, ...] | None = None,
    **more: Any,
) -> Callable[[Made], Made]:
    """Add a model to the catalogue: a function of sizes, the paper's by default, that returns a module.

    Args:
        name: what users write for it.
        papers: keys of papers of tier model, or of the operator it was published with; None with ``reference`` and
            ``family`` for one that the catalogue does not have.
        inputs: what it takes: tokens (B, N), vectors (B, N, C), image (B, C, H, W), video (B, C, T, H, W), points
            (B, N, 3) or audio (B, T). `foveate.testing.check_model` feeds it such, tokens below 16 and vectors as wide
            as ``tiny["dim"]``; ``sample(batch, size)`` among ``more`` makes others.
        presets: the paper's sizes by name, with its counts of parameters.
        tiny: sizes for tests.
        supports: "features" if it has ``features(inputs)``, the maps of its stages; "decode" if it has ``init_state``,
            ``prefill`` and ``decode``.
        uses: what users may want it for, if ``inputs`` and the papers' domains do not say it.
        more: ``reference``, ``family``, ``notes``, ``exempt``, ``sample``.

    Raises ValueError for an unknown paper, family or kind of input, for a paper of another tier, and for a name that
    is taken.
    """
    if inputs not in get_args(Input):
        raise ValueError(f"inputs of {name} are one of {', '.join(get_args(Input))}; got {inputs!r}")
    unknown = set(supports or ()) - set(get_args(ModelFeature))
    if unknown:
        raise ValueError(f"{name} supports {', '.join(sorted(unknown))}, none of {', '.join(get_args(ModelFeature))}")
    causal: tuple[Use, ...] = ("causal-lm",) if inputs == "tokens" and "decode" in (supports or ()) else ()
    found = USE_OF.get(inputs, causal) if uses is None else uses
    return _adding(
        ModelRow,
        name,
        papers,
        more | {"tiny": tiny, "uses": found},
        inputs=inputs,
        supports=frozenset(supports or ()),
        presets=presets,
    )


def method(
    name: str,
    *,
    papers: tuple[str, ...] | None,
    tiny: Mapping[str, Any],
    full_budget: Mapping[str, Any] | None,
    keeps: Callable[[int], int] | None = None,
    inputs: MethodInput | None = None,
    budget: Budget | str | None = None,
    **more: Any,
) -> Callable[[Made], Made]:
    """Add an inference method to the catalogue: a function of options that returns a `Method`.

    A pattern or core that goes into pretrained models is one already, by its operator's row
    (`foveate.methods.method_of`). This is for what is more: a cache that drops or merges, a schedule.

    Args: as of :func:`model`, and

        tiny: options at which a few dozen tokens are already sparse.
        full_budget: options that, added to ``tiny``, let the model compute what it would without the method; None where
            none do.
        keeps: of a number of tokens: how many of them the cache holds at most, with the options of ``tiny``.
        inputs: what the models read that it is for: "tokens" of text, an "image", or "video", as is assumed of one with
            a ``grid`` in ``tiny``. `foveate.testing.check_method` tries it on clips of that grid then, with tokens of
            text behind them where it has an option ``text``, their number.
        budget: the option that says how much it spends: one that counts tokens by its name, or a `Budget`.
    """
    read = inputs or ("video" if "grid" in tiny else "tokens")
    if read not in get_args(MethodInput):
        raise ValueError(f"inputs of {name} are one of {', '.join(get_args(MethodInput))}; got {inputs!r}")
    spent = Budget(budget) if isinstance(budget, str) else budget
    own = {"full_budget": full_budget, "keeps": keeps, "inputs": read, "budget": spent}
    adding = _adding(MethodRow, name, papers, more | {"tiny": tiny}, **own)

    def added(function: Made) -> Made:
        budget_of(name, spent, function)
        return adding(function)

    return added


def recipe(
    name: str,
    *,
    papers: tuple[str, ...] | None,
    teacher: Callable[[], nn.Module],
    batch: Callable[[], Any],
    inherits: float = 0.5,
    **more: Any,
) -> Callable[[Made], Made]:
    """Add a recipe to the catalogue: a function of options that returns a `Recipe`. Arguments: `RecipeRow`'s."""
    return _adding(RecipeRow, name, papers, more, teacher=teacher, batch=batch, inherits=inherits)


def parallel(
    name: str,
    *,
    papers: tuple[str, ...] | None,
    whole: Callable[..., Tensor],
    inputs: Callable[[int], tuple[Tensor, ...]],
    axes: tuple[int | None, ...],
    out: int | None = -2,
    uneven: bool = False,
    **more: Any,
) -> Callable[[Made], Made]:
    """Add a computation over a process group to the catalogue. Arguments: `ParallelRow`'s."""
    return _adding(ParallelRow, name, papers, more, whole=whole, inputs=inputs, axes=axes, out=out, uneven=uneven)


def hook(name: str, *, papers: tuple[str, ...] | None, tiny: Mapping[str, Any], **more: Any) -> Callable[[Made], Made]:
    """Add an application to the catalogue: a function of sizes that returns a `Hook`, and sizes for tests."""
    return _adding(HookRow, name, papers, more | {"tiny": tiny})


def probe(name: str, *, papers: tuple[str, ...] | None, tiny: Mapping[str, Any], **more: Any) -> Callable[[Made], Made]:
    """Add an experiment to the catalogue: a function of a seed and sizes that returns a `Finding`."""
    return _adding(ProbeRow, name, papers, more | {"tiny": tiny})


def doc(name: str, *, papers: tuple[str, ...] | None, **more: Any) -> Callable[[Made], Made]:
    """Add a survey to the catalogue: a function that returns the `Page` that says which rows it covers."""
    return _adding(DocRow, name, papers, more)


def row(name: str) -> TierRow:
    """The row of that name, of whatever tier. Imports its module, and no other.

    >>> row("swiftformer").tier, row("moba").tier
    ('model', 'operator')

    Raises ValueError for an unknown name, offering the nearest ones.
    """
    from foveate.catalogue.index import entry

    return ROWS[name] if name in ROWS else entry(name).load()


def rows(tier: str) -> list[TierRow]:
    """All rows of a tier, by family and name; imports these.

    >>> [row.name for row in rows("model") if row.family == "linear"]
    ['l2vit', 'polynormer_classifier', 'ravlt', 'swiftformer', 'transnormer']
    """
    from foveate.catalogue.index import catalogue

    return [row(entry.name) for entry in catalogue().entries if entry.tier == check_tier(tier)]


def check_tier(tier: str) -> str:
    """The tier, if there is such a one; ValueError if not."""
    from foveate.catalogue.papers import TIERS

    if tier not in TIERS:
        raise ValueError(f"there are the tiers {', '.join(TIERS)}; got {tier!r}")
    return tier


def _adding(
    kind: type[FunctionRow], name: str, keys: tuple[str, ...] | None, shared: dict[str, Any], **own: Any
) -> Callable[[Made], Made]:
    """A decorator that makes a row of this kind and adds it."""
    papers, reference, family = sources(
        kind.tier, name, keys, shared.pop("reference", None), shared.pop("family", None)
    )

    def added(function: Made) -> Made:
        if not (function.__doc__ or "").strip():
            raise ValueError(f"{name} has no docstring: its first line is what `foveate list` says of it")
        add(kind(name, papers, family, function, reference=reference, **shared, **own))
        return function

    return added
