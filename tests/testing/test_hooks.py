"""check_hook: our hooks pass it, and it finds what is broken and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import Grid
from foveate.catalogue.contracts import Hook
from foveate.catalogue.index import indexed
from foveate.catalogue.registry import Reference
from foveate.catalogue.tiers import HookRow
from foveate.mixers.core import PatternCore
from foveate.patterns import window
from foveate.testing import check_hook
from foveate.testing import hook as suite
from foveate.testing.hook import PROPERTIES


def row_of(make: Any, **tiny: Any) -> HookRow:
    return HookRow("mine", (), "none", make, reference=Reference("Nobody", "Nothing", "0000.00000"), tiny=tiny)


def text(length: int = 700, **options: Any) -> Hook:
    return Hook("streaming_llm", 4, 5, {"sinks": 2, "window": 6}, length=length, kv_heads=2, causal=True, **options)


SOUND = [
    row_of(text, length=37),
    row_of(text, length=37, queries=11, batch=3),
    row_of(lambda: Hook("neighborhood_attention", 3, 4, {"kernel": 3}, layout=Grid(7, 9), batch=2)),
    row_of(lambda: Hook("topk_blocks(8, k=2) | window(3) & causal", 2, 4, length=45)),
    row_of(lambda: Hook("memory_efficient_attention", 2, 4, length=45, queries=13)),
]


@pytest.mark.parametrize("name", [entry.name for entry in indexed().values() if entry.tier == "hook"])
def test_every_hook_holds_to_its_tier(name: str, seed: int) -> None:
    check_hook(name, seed=seed)


@pytest.mark.parametrize("row", SOUND, ids=range(len(SOUND)))
def test_a_sound_hook_passes_everything(row: HookRow, seed: int) -> None:
    assert [check.status for check in check_hook(row, seed=seed).checks] == ["passed"] * len(PROPERTIES)


def test_it_runs_at_the_sizes_of_the_application(seed: int) -> None:
    sizes = []

    def seen(length: int = 700) -> Hook:
        sizes.append(length)
        return text(length)

    assert check_hook(row_of(seen, length=37), full=True, seed=seed).ok
    assert sizes == [700]


def overflows(out: Tensor) -> Tensor:
    return out * torch.inf if out.dtype == torch.bfloat16 else out


def strays(out: Tensor) -> Tensor:
    return out * (1 + 1e-7) if not out.requires_grad else out


def learns_twice(out: Tensor) -> Tensor:
    return out + out - out.detach()


@pytest.mark.parametrize(
    ("bend", "lacks"), [(overflows, {"runs"}), (strays, {"definition"}), (learns_twice, {"gradients"})]
)
def test_a_broken_hook_fails_where_it_is_broken(
    bend: Any, lacks: set[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bent(PatternCore):
        def __call__(self, *heads: Tensor, **options: Any) -> Tensor:
            return bend(super().__call__(*heads, **options))

    monkeypatch.setattr(suite, "as_core", lambda operator: Bent(window(4)))
    report = check_hook(row_of(lambda: Hook("bent", 2, 4, length=37)), seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed


def test_what_is_no_masked_attention_is_found(seed: int) -> None:
    corrected = row_of(lambda: Hook("delta_attention", 2, 4, {"window": 4, "stride": 5}, length=37, causal=True))
    report = check_hook(corrected, seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == {"definition", "gradients"}


def test_a_hook_without_keys_is_refused(seed: int) -> None:
    report = check_hook(row_of(lambda: Hook("window(3)", 2, 4)), seed=seed, raise_on_failure=False)
    assert all("pass length or layout" in check.detail for check in report.failed) and len(report.failed) == 3
    with pytest.raises(TypeError, match="check_hook takes a hook of the catalogue"):
        check_hook("moba")
