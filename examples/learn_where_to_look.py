"""Windowed attention that trains: a bias over relative positions learns how far back the answer lies.

Each token must repeat the token 5 places before it. Queries and keys are the same everywhere, so the only
thing that can tell one key from another is a table with one learned number per distance.
"""

import torch

from foveate import attend, causal, relative_table, window

BACK, REACH, BATCH, SYMBOLS, HEADS, LENGTH = 5, 8, 4, 16, 1, 100

torch.manual_seed(0)
table = torch.zeros(HEADS, 2 * REACH + 1, requires_grad=True)
optimizer = torch.optim.Adam([table], lr=0.3)

for step in range(40):
    symbols = torch.randint(SYMBOLS, (BATCH, LENGTH))
    values = torch.nn.functional.one_hot(symbols, SYMBOLS).float().unsqueeze(1)  # (B, 1, N, symbols)
    same = torch.zeros(BATCH, HEADS, LENGTH, 8)
    seen = attend(same, same, values, window(REACH) & causal, bias=relative_table(table)).squeeze(1)
    loss = -seen[:, BACK:].gather(2, symbols[:, :-BACK].unsqueeze(2)).clamp_min(1e-6).log().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")

learned = int(table[0].argmax()) - REACH
print(f"step {step:3d}  loss {loss.item():.3f}  it looks {learned} tokens back")
assert learned == BACK and loss.item() < 0.1
