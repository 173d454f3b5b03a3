"""S-Mamba: the forecaster written out, and what its scans of variates are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.scan_formulas import agree, as_it_begins, gated, shaken
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foveate.mixers.recurrent_ssm.s_mamba import SMamba
from foveate.models.series import s_mamba_forecaster


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return unit * norm.weight + norm.bias


def mapped(linear: nn.Module, x: Tensor) -> Tensor:
    return x @ linear.weight.mT + linear.bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


@pytest.mark.paper("S-Mamba", "definition")
@pytest.mark.parametrize("begun", [as_it_begins, shaken])
def test_the_forecaster_is_the_paper_s_written_out(begun: Any) -> None:
    model = begun(s_mamba_forecaster(11, 5, dim=12, depth=2, hidden=20, state=4)).eval()
    series = (3 + 2 * torch.randn(2, 11, 7, dtype=torch.float64)).requires_grad_()
    mean = series.sum(1, keepdim=True) / 11
    spread = ((series - mean).square().sum(1, keepdim=True) / 11 + 1e-5).sqrt()
    x = mapped(model.embed, ((series - mean) / spread).transpose(1, 2))
    for layer in model.layers:
        both = gated(layer.mix.forwards, x) + gated(layer.mix.backwards, x.flip(1)).flip(1)
        x = normed(layer.norms[0], x + both)
        x = normed(layer.norms[1], x + mapped(layer.second, gelu(mapped(layer.first, x))))
    future = mapped(model.to_future, normed(model.norm, x)).transpose(1, 2)
    agree(model, model(series), future * spread + mean, series)


class Alone(SMamba):
    """Variates that hear nothing of one another: each is a sequence of its own."""

    def mix(self, x: Tensor, *rest: Any) -> Tensor:
        return super().mix(x.reshape(-1, 1, self.dim), *rest).reshape(x.shape)


@pytest.mark.paper("S-Mamba", "works_when")
def test_it_forecasts_what_variates_say_of_one_another() -> None:
    """Each variate repeats what the next one did, and the last what the first did: both scans are wanted."""

    def drawn(batch: int) -> tuple[Tensor, Tensor]:
        series = torch.randn(batch, 6, 4)
        series = (series - series.mean(1, keepdim=True)) / series.std(1, correction=0, keepdim=True)
        return series, series.roll(-1, 2)[:, 3:]

    losses = []
    for kind in (SMamba, Alone):
        torch.manual_seed(2)
        model = s_mamba_forecaster(6, 3, dim=16, depth=1, hidden=32, state=4, dropout=0.0)
        model.layers[0].mix = kind(16, state=4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(120):
            series, future = drawn(64)
            loss = mse_loss(model(series), future)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            series, future = drawn(256)
            losses.append(mse_loss(model(series), future).item())
    assert losses[0] < 0.6 and losses[1] > 0.9  # of a variance of 1


def test_series_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="batch, 12, variates"):
        s_mamba_forecaster(12, 5, dim=8, depth=1, hidden=8)(torch.zeros(1, 11, 3))
