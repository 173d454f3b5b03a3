"""A prompt read at once, then token by token: states that grow or do not, outputs as over the whole sequence."""

import torch

from foveate.catalogue.registry import mixer

DIM, HEADS, PROMPT, LENGTH = 64, 4, 70, 100

torch.manual_seed(0)
tokens = torch.randn(1, LENGTH, DIM)
print(f"{'mechanism':20s} {'kept after 100':>15s} {'after 100,000':>15s}   step = forward")
for name in ("flash_attention", "streaming_llm", "linear_transformer", "gated_deltanet"):
    attention = mixer(name, DIM, heads=HEADS, **({"window": 64} if name == "streaming_llm" else {}))
    with torch.no_grad():
        out, state = attention.prefill(tokens[:, :PROMPT], attention.init_state(batch=1, capacity=LENGTH))
        outs = [out]
        for t in range(PROMPT, LENGTH):
            out, state = attention.decode(tokens[:, t : t + 1], state)
            outs.append(out)
        error = (torch.cat(outs, dim=1) - attention(tokens)).abs().max().item()
    kept = [f"{attention.state_bytes(n) / 1024:,.0f} KiB" for n in (LENGTH, 100_000)]
    print(f"{name:20s} {kept[0]:>15s} {kept[1]:>15s}   within {error:.0e}")
    assert error < 1e-4
