"""Answers requests over HTTP, each under its own mix of experts."""
