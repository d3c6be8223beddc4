"""Suites: real experts and their data, made from pinned public packages."""
