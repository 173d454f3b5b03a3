"""Parallel context windows against an ensemble: both by the plain model, and what the probe says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from foveate.catalogue import tiers
from foveate.lab.probes.parallel_windows import bits, ensemble, in_parallel, logit_ensemble
from foveate.models import builtin

LENGTHS, TASK = (13, 8, 17), 7


@pytest.mark.paper("PCW revisit", "definition")
@pytest.mark.paper("PCW revisit", "works_when")
@torch.no_grad()
def test_windows_are_blocks_that_share_positions_and_the_task_sees_them_all() -> None:
    """In the built-in model, under a mask and with positions written out; the ensemble window by window."""
    model: Any = builtin.load()[0]
    model.set_attn_implementation("sdpa")
    tokens = torch.randint(256, (2, sum(LENGTHS) + TASK))
    *windows, task = tokens.split([*LENGTHS, TASK], 1)
    number = [window for window, length in enumerate(LENGTHS) for _ in range(length)] + [-1] * TASK
    seen = torch.tensor(
        [[j <= i and number[i] in (-1, number[j]) for j in range(len(number))] for i in range(len(number))]
    )
    places = [place for length in LENGTHS for place in range(length)] + [max(LENGTHS) + i for i in range(TASK)]
    logits = model(tokens, attention_mask=seen[None, None], position_ids=torch.tensor([places])).logits
    assert_close(in_parallel(model, windows, task), logits[:, -TASK:-1].log_softmax(-1), rtol=1e-3, atol=1e-3)
    apart = [model(torch.cat([window, task], 1)).logits[:, -TASK:-1].softmax(-1) for window in windows]
    mean = (apart[0] + apart[1] + apart[2]) / 3
    assert_close(ensemble(model, windows, task), mean.log(), rtol=1e-4, atol=1e-4)
    logits = [model(torch.cat([window, task], 1)).logits[:, -TASK:-1] for window in windows]
    assert_close(
        logit_ensemble(model, windows, task),
        ((logits[0] + logits[1] + logits[2]) / 3).log_softmax(-1),
        rtol=1e-4,
        atol=1e-4,
    )
    told = -sum(mean[b, i, task[b, i + 1]].log2() for b in range(2) for i in range(TASK - 1)) / (2 * (TASK - 1))
    assert_close(torch.tensor(bits(mean.log(), task)), told, rtol=1e-4, atol=1e-5)


@pytest.mark.paper("PCW revisit", "works_when")
def test_on_real_code_the_ensemble_is_held_against_windows_in_parallel() -> None:
    """Of next tokens of code the ensemble knows a little less: what was found of classes does not hold of them."""
    row: Any = tiers.row("parallel_windows")
    found = row.run(0)
    figures = found.figures
    assert figures["ensemble"] < figures["ensemble of logits"] < figures["last window"] + 1
    assert figures["one text"] < figures["parallel windows"] < figures["last window"]
    assert found.verdict == "refuted" and figures["ensemble"] < figures["parallel windows"] + 0.2, figures
