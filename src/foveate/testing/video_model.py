"""A video diffusion transformer in small, to try methods on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS, TEXT_DIM, DIM = 4, 6, 32


class SmallVideoModel(nn.Module):
    """Two layers in which the tokens of a clip, and those of a text behind them, all see one another.

    It takes noisy latents (B, 4, T, H, W), the time of denoising (B,) and a text (B, L, 6), of which ``text_mask``
    (B, L) says what is no padding, and returns the latents' velocity (B, 4, T, H, W). With ``joint=False`` the text's
    mean is added to every token instead, as models do whose attention is of the clip alone.
    """

    def __init__(self, joint: bool = True) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=1,
            hidden_size=DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            initializer_range=0.3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.joint = joint
        self.from_latents, self.from_text = nn.Linear(CHANNELS, DIM), nn.Linear(TEXT_DIM, DIM)
        self.from_time, self.to_velocity = nn.Linear(1, DIM), nn.Linear(DIM, CHANNELS)
        self.blocks = BertModel(config, add_pooling_layer=False)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        dims, length = latents.shape[2:], latents[0, 0].numel()
        x, words = self.from_latents(latents.flatten(2).mT), self.from_text(text)  # (B, THW, C), (B, L, C)
        mask = None
        if self.joint:
            x = torch.cat((x, words), 1)
            if text_mask is not None:
                mask = torch.cat((text_mask.new_ones(len(x), length), text_mask), 1)
        else:
            x = x + words.mean(1, keepdim=True)
        x = x + self.from_time(timestep.to(x).view(-1, 1, 1))
        hidden = self.blocks(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return self.to_velocity(hidden[:, :length]).mT.unflatten(2, dims)
