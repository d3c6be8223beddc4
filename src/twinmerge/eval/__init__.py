"""Tasks, metrics, contestants and their results."""
