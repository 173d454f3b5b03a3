"""From a pattern to what a kernel runs: selections, dense masks, block masks of FlexAttention."""
