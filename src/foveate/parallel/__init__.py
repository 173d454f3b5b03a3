"""The distributed tier: attention and recurrences over a process group of torch.distributed."""

from foveate.parallel.tree import tree_attention

__all__ = ["tree_attention"]
