"""Give a pretrained transformers model another attention, see what it costs, and give the old one back."""

import torch

from foveate import causal, sinks, window
from foveate.adapt import replace_attention
from foveate.models import builtin

model, tokenizer = builtin.load()
ids = tokenizer(builtin.heldout_text(6000), return_tensors="pt").input_ids[:, :1500]


@torch.no_grad()
def loss() -> float:
    return model(input_ids=ids, labels=ids).loss.item()


print(f"{'full attention':42s} {loss():.4f} nats per token")
for mechanism in ("streaming_llm", window(64) & causal, window(64) & causal | sinks(4)):
    with replace_attention(model, mechanism):
        print(f"{mechanism!s:42s} {loss():.4f}")
print(f"{'full attention again':42s} {loss():.4f}")
