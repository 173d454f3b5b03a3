"""Linear recurrences with matrix states: recur."""
