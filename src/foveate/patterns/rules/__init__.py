"""The patterns there are: by position, on grids, from lists, and chosen by looking at queries and keys."""
