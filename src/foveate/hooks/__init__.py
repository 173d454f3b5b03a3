"""The hook tier: the attention of applications as data, operator, options and shapes."""
