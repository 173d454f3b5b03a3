"""Linear recurrences a chunk of tokens at a time: dense products inside, a short loop between."""
