"""Numbers and files: checkpoints, low-rank pairs, sparse parts; knows no model."""
