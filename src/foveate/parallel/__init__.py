"""The distributed tier: attention and recurrences over a process group of torch.distributed."""

from foveate.parallel.star import star_context, star_query
from foveate.parallel.tree import tree_attention

__all__ = ["star_context", "star_query", "tree_attention"]
