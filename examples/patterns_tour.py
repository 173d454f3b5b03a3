"""A tour of patterns: small ones joined by &, | and ~, and what each looks like."""

from foveate import (
    Beside,
    Grid,
    block_diffusion,
    blocks,
    causal,
    document_prefix,
    documents,
    mask_mod,
    neighborhood,
    per_head,
    prefix,
    shared_prefix,
    sinks,
    spans,
    sta,
    window,
)

LENGTH = 16

for pattern in (
    causal,
    window(4) & causal,
    window(4) & causal | sinks(2),
    blocks(4) | ~blocks(8) & causal,
    causal | prefix(5),
    causal & documents([5, 8, 3]),
    causal & documents([5, 8, 3]) | document_prefix([5, 8, 3], [2, 4, 1]),
    causal & shared_prefix(4, [5, 7]),
    causal | spans([(2, 4), (9, 6)]),
    block_diffusion(LENGTH // 2, 2),
    causal & mask_mod(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0),
    per_head([window(1), window(6)]) & causal,
):
    print(pattern)
    print(pattern.draw(LENGTH), end="\n\n")

image = Grid(4, 4)
print(f"{neighborhood((3, 3))} on {image}")
print(neighborhood((3, 3)).draw(layout=image), end="\n\n")

text_behind = Beside(image, after=5)
print(f"{sta(2, (2, 1))} on {text_behind}")
print(sta(2, (2, 1)).draw(layout=text_behind))
