"""A tour of patterns: small ones joined by &, | and ~, and what each looks like."""

from foveate import Grid, blocks, causal, documents, neighborhood, per_head, prefix, sinks, window

LENGTH = 16

for pattern in (
    causal,
    window(4) & causal,
    window(4) & causal | sinks(2),
    blocks(4) | ~blocks(8) & causal,
    causal | prefix(5),
    causal & documents([5, 8, 3]),
    per_head([window(1), window(6)]) & causal,
):
    print(pattern)
    print(pattern.draw(LENGTH), end="\n\n")

image = Grid(4, 4)
print(f"{neighborhood((3, 3))} on {image}")
print(neighborhood((3, 3)).draw(layout=image))
