"""A passkey hidden in noise: what decimation and notes do for Mamba at lengths it was not trained on."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from torch import Tensor, nn

from foveate.mixers.base import Mixer
from foveate.mixers.recurrent_ssm.decimamba import DeciMamba
from foveate.mixers.recurrent_ssm.mamba import Mamba
from foveate.mixers.recurrent_ssm.memmamba import MemMamba

KEYS, LETTERS = 4, 12  # the first letters are keys, the others noise
QUESTION = LETTERS


def passkeys(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Noise with one key somewhere in it, and a question mark at its end: (B, N), and the keys (B,)."""
    text = torch.randint(KEYS, LETTERS, (batch, length))
    keys = torch.randint(KEYS, (batch,))
    text[torch.arange(batch), torch.randint(length - 1, (batch,))] = keys
    text[:, -1] = QUESTION
    return text, keys


class Reader(nn.Module):
    """Residual layers over letters, and a guess at the last one."""

    def __init__(self, *layers: Mixer) -> None:
        super().__init__()
        dim = layers[0].dim
        self.embed, self.head = nn.Embedding(LETTERS + 1, dim), nn.Linear(dim, KEYS)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in layers)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            if isinstance(layer, DeciMamba):
                out, kept, _ = layer.decimate(norm(x))
                x = x.gather(1, kept.unsqueeze(-1).expand_as(out)) + out
            else:
                x = x + layer(norm(x))
        return self.head(x[:, -1])

    def trained(self, length: int, steps: int) -> Reader:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        for _ in range(steps):
            text, keys = passkeys(64, length)
            loss = nn.functional.cross_entropy(self(text), keys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self

    @torch.no_grad()
    def accuracy(self, length: int, batch: int = 300) -> float:
        text, keys = passkeys(batch, length)
        return (self(text).argmax(-1) == keys).float().mean().item()


def layers(*keeps: int | None) -> list[Mixer]:
    """Layers that keep so many tokens, or all."""
    return [
        Mamba(24, expand=1, state=4) if keep is None else DeciMamba(24, keep=keep, expand=1, state=4) for keep in keeps
    ]


def best_of(plain: Reader, length: int) -> Reader:
    """The trained layers, untouched, of which one or both decimate: chosen at 4 times the length."""
    found = []
    for keeps in ((length, None), (None, length), (length, length)):
        model = Reader(*layers(*keeps))
        model.load_state_dict(plain.state_dict())
        found.append(model)
    return max(found, key=lambda model: model.accuracy(4 * length))


@pytest.mark.long
def test_decimation_finds_passkeys_at_sixteen_times_the_length() -> None:
    """On the average of several trained models; which layers decimate is chosen for each, at 4 times the length."""
    length, gains = 16, []
    for _ in range(4):
        model = Reader(*layers(None, None)).trained(length, 150)
        gains.append(best_of(model, length).accuracy(16 * length) - model.accuracy(16 * length))
    assert mean(gains) > 0


@pytest.mark.long
def test_notes_find_passkeys_where_mamba_forgets_them() -> None:
    plain, noting = [], []
    for _ in range(6):
        plain.append(Reader(Mamba(24, expand=1, state=1)).trained(32, 200).accuracy(512))
        mixer = MemMamba(24, depth=1, every=1, slots=2, width=16, expand=1, state=1)
        noting.append(Reader(mixer).trained(32, 200).accuracy(512))
    assert mean(noting) > mean(plain)
