"""ZeroI2V: an image transformer becomes one of videos, at the cost of the image transformer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.adapt.swap import use
from foveate.attention import attend
from foveate.catalogue.contracts import Stage
from foveate.catalogue.tiers import recipe
from foveate.patterns import Pattern, full


def shifted_in_time(x: Tensor, frames: int, heads: int) -> Tensor:
    """Heads x (B T, H, N, D) of clips of T frames: the first ``heads`` as in the frame before, as many more as in the
    frame behind, the rest as they are; at the ends of a clip all keep their own.

    >>> shifted_in_time(torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 1, 1), 3, 1)[..., 0, 0]
    tensor([[0., 1., 0.],
            [0., 2., 1.],
            [1., 2., 2.]])
    """
    if x.shape[0] % frames:
        raise ValueError(f"clips have {frames} frames each; got {x.shape[0]} frames in all")
    clip = x.unflatten(0, (-1, frames))
    out = clip.clone()
    out[:, 1:, :heads] = clip[:, :-1, :heads]
    out[:, :-1, heads : 2 * heads] = clip[:, 1:, heads : 2 * heads]
    return out.flatten(0, 1)


@dataclass(frozen=True)
class DualHeads:
    """Attention of frames some of whose heads read the keys and values of the frame before or behind."""

    frames: int
    heads: int  # of either kind
    pattern: Pattern = full

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, layout: Any = None, **options: Any
    ) -> Tensor:
        k, v = (shifted_in_time(one, self.frames, self.heads) for one in (k, v))
        return attend(q, k, v, within, layout=layout, **options)


class LinearAdapter(nn.Module):
    """x + scale · (x W₁ + b₁) W₂ + b₂ of few channels between; nothing to begin with, a matrix in the end."""

    def __init__(self, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.scale = nn.Linear(dim, hidden), nn.Linear(hidden, dim), scale
        nn.init.trunc_normal_(self.fc1.weight, std=0.02)
        for zero in (self.fc1.bias, self.fc2.weight, self.fc2.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(self.fc1(x))

    def as_matrix(self) -> tuple[Tensor, Tensor]:
        """The matrix A and the vector b that it is: x Aᵀ + b, in float64."""
        first, second = self.fc1.weight.double(), self.fc2.weight.double()
        matrix = torch.eye(len(second), dtype=torch.float64, device=second.device) + self.scale * second @ first
        return matrix, self.scale * (second @ self.fc1.bias.double() + self.fc2.bias.double())


class FrameEmbedding(nn.Module):
    """What the number of a frame adds to its tokens (B T, N, C): nothing, to begin with."""

    def __init__(self, frames: int, dim: int) -> None:
        super().__init__()
        self.times = nn.Parameter(torch.zeros(frames, dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(0, (-1, len(self.times))) + self.times[:, None]).flatten(0, 1)


class VideoModel(nn.Module):
    """An image classifier on the frames of videos (B, channels, T, height, width): the mean of their logits."""

    def __init__(self, image: Any, frames: int, heads: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.image, self.frames = image, frames
        vit, dim = image.base_model, image.config.hidden_size
        vit.embeddings.dropout = nn.Sequential(vit.embeddings.dropout, FrameEmbedding(frames, dim))
        for layer in vit.layers:
            adapter = (LinearAdapter(dim, hidden, scale) for _ in range(3))
            layer.layernorm_before = nn.Sequential(layer.layernorm_before, next(adapter))
            layer.attention.o_proj = nn.Sequential(layer.attention.o_proj, next(adapter))
            layer.layernorm_after = nn.Sequential(layer.layernorm_after, next(adapter))
        use(image, DualHeads(frames, heads))

    def forward(self, videos: Tensor) -> Tensor:
        if videos.dim() != 5 or videos.shape[2] != self.frames:
            raise ValueError(f"videos are (batch, channels, {self.frames}, height, width); got {tuple(videos.shape)}")
        logits = self.image(videos.transpose(1, 2).flatten(0, 1)).logits
        return logits.unflatten(0, (-1, self.frames)).mean(1)

    @torch.no_grad()
    def fold(self) -> None:
        """Take the adapters into the linear layers beside them: the same function, of the image model's size."""
        for layer in self.image.base_model.layers:
            attention = layer.attention
            if isinstance(layer.layernorm_before, nn.Sequential):
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                    _absorb_before(linear, layer.layernorm_before[1])
                _absorb_before(layer.mlp.fc1, layer.layernorm_after[1])
                _absorb_behind(attention.o_proj[0], attention.o_proj[1])
                layer.layernorm_before, layer.layernorm_after = layer.layernorm_before[0], layer.layernorm_after[0]
                attention.o_proj = attention.o_proj[0]


def _absorb_before(linear: nn.Linear, adapter: Any) -> None:
    matrix, vector = adapter.as_matrix()
    weight = linear.weight.double()
    linear.bias.copy_(linear.bias.double() + weight @ vector)
    linear.weight.copy_(weight @ matrix)


def _absorb_behind(linear: nn.Linear, adapter: Any) -> None:
    matrix, vector = adapter.as_matrix()
    linear.bias.copy_(matrix @ linear.bias.double() + vector)
    linear.weight.copy_(matrix @ linear.weight.double())


@dataclass(frozen=True)
class ZeroI2V:
    """ZeroI2V's recipe with its options; see :func:`zeroi2v`."""

    frames: int
    share: float
    hidden: float
    scale: float
    steps: int
    lr: float

    def prepare(self, model: nn.Module) -> VideoModel:
        """A video model with the image model's weights; adapters begin as nothing."""
        config: Any = model.config
        heads = int(config.num_attention_heads * self.share)
        if not heads or 2 * heads > config.num_attention_heads:
            raise ValueError(
                f"share is of heads that read either neighbour, at least one and at most half of"
                f" {config.num_attention_heads}; got {self.share}"
            )
        hidden = max(1, int(config.hidden_size * self.hidden))
        student = VideoModel(copy.deepcopy(model), self.frames, heads, hidden, self.scale)
        return student.to(next(model.parameters()))

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage("adapt", learns, classification_loss, steps=self.steps, lr=self.lr),)


def learns(name: str) -> bool:
    """The adapters, what frames' numbers add, the last norm and the classifier; the image model stays as it is."""
    return (any(part in name for part in (".fc1.", ".fc2.")) and ".mlp." not in name) or any(
        part in name for part in ("times", "image.vit.layernorm.", "classifier")
    )


def classification_loss(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of videos and their classes; the teacher has no say."""
    videos, classes = batch
    return cross_entropy(student(videos), classes)


def _teacher() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_channels=1,
        initializer_range=0.2,
    )
    config.num_labels = 4
    return ViTForImageClassification(config)


@recipe(
    "zeroi2v",
    papers=("ZeroI2V",),
    teacher=_teacher,
    batch=lambda: (torch.randn(4, 1, 3, 8, 8), torch.randint(4, (4,))),
    inherits=0.99,
    tiny={"frames": 3, "share": 1 / 3, "lr": 1e-2},
)
def zeroi2v(
    *,
    frames: int = 8,
    share: float = 1 / 12,
    hidden: float = 0.25,
    scale: float = 0.5,
    steps: int = 1000,
    lr: float = 3e-4,
) -> ZeroI2V:
    """An image transformer (transformers' ViT) becomes one of videos: some heads look into neighbouring frames.

    A ``share`` of heads reads the keys and values of the frame before, as many those of the frame behind; whatever
    fused attention is at work runs on them. Linear adapters of ``hidden`` times the width, times ``scale``, stand
    before the projections, behind them and before the MLP; they alone learn, with the frames' embedding, the last norm
    and the classifier, and ``fold`` takes them into the weights: no parameter and no operation more than before.

    Li, Zhu, Wang, ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video, arXiv 2310.01324.
    As in the authors' code, but for its dropout; there heads are channels, a twelfth of them each way.

    >>> recipe = zeroi2v(frames=3, share=1 / 3)
    >>> video_model = recipe.prepare(_teacher())
    >>> video_model(torch.randn(2, 1, 3, 8, 8)).shape
    torch.Size([2, 4])
    """
    return ZeroI2V(frames, share, hidden, scale, steps, lr)
