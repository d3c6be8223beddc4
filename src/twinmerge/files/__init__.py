"""Disk: checkpoints, rows, YAML, and one durable place to write to; knows no model."""
