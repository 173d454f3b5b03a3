"""Spiking self-attention: neurons against a plain loop, both orders of the products, surrogate gradients."""

from __future__ import annotations

import pytest
import torch
from tests.support.counted_work import work
from torch import Tensor, nn
from torch.testing import assert_close

from foveate.mixers.linear.spiking import SpikingSelfAttention, fire

DIM, HEADS, TIME = 24, 3, 4


def make(**options: float) -> SpikingSelfAttention:
    """In training mode: batch norms bring currents near the threshold."""
    return SpikingSelfAttention(DIM, heads=HEADS, time=TIME, threshold=0.4, **options)


def neurons(currents: Tensor, threshold: float, tau: float) -> Tensor:
    """Each neuron on its own, step by step."""
    out = torch.zeros_like(currents)
    for index in range(currents[0].numel()):
        potential = 0.0
        for step in range(currents.shape[0]):
            potential += (float(currents[step].flatten()[index]) - potential) / tau
            if potential >= threshold:
                out[step].view(-1)[index] = 1
                potential = 0.0
    return out


@pytest.mark.parametrize(("threshold", "tau"), [(1.0, 2.0), (0.5, 3.0)])
def test_neurons_integrate_leak_and_fire(threshold: float, tau: float) -> None:
    currents = 2 * torch.randn(9, 3, 7).double()
    spikes = fire(currents, threshold=threshold, tau=tau)
    assert_close(spikes, neurons(currents, threshold, tau))
    assert 0.05 < spikes.mean() < 0.7


def test_the_gradient_of_a_spike_is_a_sigmoids() -> None:
    current = torch.tensor([[0.4, 1.9, 2.0, 5.0]], dtype=torch.float64, requires_grad=True)
    fire(current).sum().backward()
    over = (current.detach()[0] / 2 - 1).requires_grad_()
    torch.sigmoid(4 * over).sum().backward()
    assert over.grad is not None and current.grad is not None
    assert_close(current.grad[0], over.grad / 2)


def test_a_spike_blocks_the_gradient_to_the_potential_before_it() -> None:
    current = torch.tensor([[3.0], [1.0]], dtype=torch.float64, requires_grad=True)
    fire(current)[1].sum().backward()
    assert current.grad is not None
    assert current.grad[0] == 0 and current.grad[1] > 0  # the potential fell to 0 after the first step


def fired(currents: Tensor, threshold: float) -> Tensor:
    """Leaky integrate-and-fire with τ = 2, step by step."""
    potential, spikes = torch.zeros_like(currents[0]), []
    for current in currents:
        potential = (potential + current) / 2
        spikes.append((potential >= threshold).to(current.dtype))
        potential = torch.where(potential >= threshold, 0, potential)
    return torch.stack(spikes)


def layer(spiking: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, a batch norm in training, neurons."""
    flat = (x @ spiking.linear.weight.mT + (0 if spiking.linear.bias is None else spiking.linear.bias)).flatten(0, 2)
    normed = (flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    return fired((normed * spiking.norm.weight + spiking.norm.bias).view_as(x), 0.4)


def test_spiking_attention_is_its_formula() -> None:
    mixer, x = make(scale=0.25).double(), torch.randn(2, 37, DIM, dtype=torch.float64)
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    steps = x.expand(TIME, -1, -1, -1)
    q, k, v = (
        layer(spiking, steps).unflatten(-1, (HEADS, -1)).transpose(2, 3)
        for spiking in (mixer.to_q, mixer.to_k, mixer.to_v)
    )
    heads = 0.25 * (q @ k.mT) @ v  # (T, B, H, N, D)
    expected = layer(mixer.to_out, fired(heads.transpose(2, 3).flatten(3), 0.2))
    assert 0.01 < expected.mean() < 0.99
    assert torch.equal(mixer.spikes(steps), expected)
    assert_close(mixer(x), expected.mean(0))


def test_both_orders_of_the_products_agree_to_the_last_bit() -> None:
    mixer, x = make(), torch.randn(2, 37, DIM)
    steps = x.expand(TIME, -1, -1, -1)
    q, k, v = (mixer.split(spiking(steps)) for spiking in (mixer.to_q, mixer.to_k, mixer.to_v))
    for spikes in (q, k, v):
        assert set(spikes.unique().tolist()) == {0.0, 1.0}
    queries_first, keys_first = (q @ k.transpose(2, 3)) @ v, q @ (k.transpose(2, 3) @ v)
    assert torch.equal(queries_first, keys_first)
    heads = (queries_first * mixer.scale).transpose(1, 2).flatten(2).view_as(steps)
    assert heads.count_nonzero() > 0
    expected = mixer.to_out(fire(heads, threshold=0.2))
    assert torch.equal(mixer.spikes(steps), expected)
    assert torch.equal(mixer(x), expected.mean(0))
    assert 0 < expected.mean() < 1


def test_it_learns_by_its_surrogate() -> None:
    """Which of the tokens' two halves is louder, told by the rates of the spikes."""
    mixer, head = make(scale=0.5), nn.Linear(DIM, 2)
    optimizer = torch.optim.Adam([*mixer.parameters(), *head.parameters()], lr=2e-2)
    losses = []
    for _ in range(30):
        x, labels = torch.randn(16, 11, DIM), torch.randint(2, (16,))
        x[:, :, : DIM // 2] *= 2 * labels.view(-1, 1, 1) + 0.3
        loss = nn.functional.cross_entropy(head(mixer(x).mean(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:5]) / 5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_counted_work_is_linear_in_tokens_and_steps() -> None:
    def counted(tokens: int, time: int) -> int:
        mixer = SpikingSelfAttention(16, heads=2, time=time)
        return work(lambda: mixer(torch.randn(1, tokens, 16)))

    assert 1.9 < counted(2000, 2) / counted(1000, 2) < 2.1
    assert 1.9 < counted(1000, 4) / counted(1000, 2) < 2.1


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        SpikingSelfAttention(64, time=0)
