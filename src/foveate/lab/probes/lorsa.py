"""Lorsa: an attention layer taken apart into many heads that write one direction each, few of them at a time."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foveate.attention import attend
from foveate.catalogue.contracts import Finding
from foveate.catalogue.tiers import probe
from foveate.lab.probes.picture import Curve, curves
from foveate.layers.rotary import rotate
from foveate.mixers.base import split_heads
from foveate.mixers.exact_io.flash_attention import FlashAttention
from foveate.patterns import causal


class LowRankSparseAttention(nn.Module):
    """Causal attention of many heads with one value channel each, in groups that share queries and keys.

    Of each token the ``active`` heads whose outputs are longest, |z_h| ‖w_h‖, write; the others are silent. ``active``
    of None lets all write.

    >>> LowRankSparseAttention(16, heads=24, groups=4, width=8, active=3)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(
        self, dim: int, *, heads: int, groups: int, width: int, active: int | None, rotary: float | None = None
    ) -> None:
        super().__init__()
        if heads % groups or not (active is None or 1 <= active <= heads):
            raise ValueError(f"groups divide heads, and active is some of them; got {heads}, {groups} and {active}")
        self.groups, self.active, self.rotary = groups, active, rotary
        self.to_q, self.to_k = (nn.Linear(dim, groups * width) for _ in range(2))
        self.to_v, self.to_out = nn.Linear(dim, heads), nn.Linear(heads, dim)
        for layer in (self.to_q, self.to_k, self.to_v, self.to_out):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def activations(self, x: Tensor) -> Tensor:
        """What each head writes of its direction, (B, N, heads), 0 where it is silent."""
        q, k, v = (split_heads(layer(x), self.groups) for layer in (self.to_q, self.to_k, self.to_v))
        if self.rotary is not None:
            at = torch.arange(x.shape[1], device=x.device)
            q, k = rotate(q, at, self.rotary), rotate(k, at, self.rotary)
        z = attend(q, k, v, causal).transpose(1, 2).flatten(2)  # a group's values are its heads' channels
        if self.active is None:
            return z
        lengths = z.detach().abs() * self.to_out.weight.detach().norm(dim=0)
        best = lengths.topk(self.active, dim=-1).indices
        return torch.where(torch.zeros_like(z, dtype=torch.bool).scatter(-1, best, True), z, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.activations(x))


class Layer(NamedTuple):
    """What an attention layer is given and what it returns, (texts, N, C), and the base of its rotary positions."""

    inputs: Tensor
    outputs: Tensor
    rotary: float | None


def explained(found: Tensor, wanted: Tensor) -> float:
    """The share of the variance of tokens (B, N, C) that is explained: 1 for equal ones, 0 for their mean."""
    apart = (found.detach() - wanted).square().sum(-1).mean()
    return float(1 - apart / (wanted - wanted.mean((0, 1))).square().sum(-1).mean())


def reconstruct(lorsa: LowRankSparseAttention, layer: Layer, *, steps: int, batch: int, lr: float) -> list[float]:
    """Train on the layer's outputs, mean squares; the losses. The last eighth of the texts is left for trials."""
    trained = len(layer.inputs) - len(layer.inputs) // 8
    optimizer, losses = torch.optim.Adam(lorsa.parameters(), lr=lr), []
    spread = layer.outputs.square().mean()
    for _ in range(steps):
        some = torch.randint(trained, (batch,))
        loss = mse_loss(lorsa(layer.inputs[some]), layer.outputs[some]) / spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def of_random(texts: int, length: int, dim: int) -> Layer:
    """A layer of four heads with random weights, and random tokens."""
    layer, inputs = FlashAttention(dim, 4), torch.randn(texts, length, dim)
    return Layer(inputs, layer(inputs), None)


@torch.no_grad()
def of_builtin(texts: int, length: int, number: int = 1) -> Layer:
    """A layer of the model that comes with Foveate, on its held-out text."""
    from foveate.models import builtin

    model, tokenizer = builtin.load()
    text = builtin.heldout_text(8 * texts * length)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: texts * length]).view(-1, length)
    kept: list[tuple[Tensor, Tensor]] = []
    attention = model.model.layers[number].self_attn

    def keep(module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor], out: tuple[Tensor, ...]) -> None:
        kept.append((args[0] if args else options["hidden_states"], out[0]))

    hook = attention.register_forward_hook(keep, with_kwargs=True)
    for some in tokens.split(16):
        model(some)
    hook.remove()
    inputs, outputs = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return Layer(inputs, outputs, float(model.config.rope_parameters["rope_theta"]))


@probe(
    "lorsa",
    papers=("Lorsa",),
    tiny={"target": "random", "texts": 16, "length": 8, "heads": 24, "groups": 4, "active": 3, "steps": 4, "batch": 4},
)
def lorsa(
    seed: int = 0,
    *,
    target: Literal["builtin", "random"] = "builtin",
    texts: int = 96,
    length: int = 64,
    heads: int = 512,
    groups: int = 16,
    width: int = 16,
    active: int = 32,
    steps: int = 200,
    batch: int = 8,
    lr: float = 3e-3,
) -> Finding:
    """Few of many heads of one direction each rebuild an attention layer better than as few that are always at work.

    A Lorsa layer learns a layer's outputs: ``heads`` heads in ``groups`` that share queries and keys, of which
    ``active`` write at each token. So does one that has only as many heads, all at work. The shares of variance that
    they explain on texts left out are reported; confirmed where the sparse one explains more, and more than half.

    He, Ge, Chen, Zhou et al., Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition,
    arXiv 2504.20938, after the authors' published code.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = of_builtin(texts, length) if target == "builtin" else of_random(texts, length, 16)
        dim, rest = layer.inputs.shape[2], slice(len(layer.inputs) - len(layer.inputs) // 8, None)
        figures, lines = {}, []
        for name, count, chosen in (("sparse", heads, active), ("few", active, None)):
            shared = groups if chosen is not None else next(g for g in range(groups, 0, -1) if count % g == 0)
            made = LowRankSparseAttention(
                dim, heads=count, groups=shared, width=width, active=chosen, rotary=layer.rotary
            )
            losses = reconstruct(made, layer, steps=steps, batch=batch, lr=lr)
            with torch.no_grad():
                figures[f"{name}: variance explained"] = explained(made(layer.inputs[rest]), layer.outputs[rest])
                writing = (made.activations(layer.inputs[rest]) != 0).double().sum(-1).mean()
            figures[f"{name}: heads writing at a token"] = float(writing)
            lines.append(Curve(name, list(map(float, range(1, steps + 1))), losses))
    better = figures["sparse: variance explained"] > figures["few: variance explained"]
    confirmed = better and figures["sparse: variance explained"] > 0.5
    picture = curves("loss, as a share of the layer's mean square", lines, x="step", y="loss")
    claim = "sparsely active heads of rank one reconstruct an attention layer"
    return Finding(claim, confirmed, figures, picture)
