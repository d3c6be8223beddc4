"""Inference: gated layers, the twin as a module, the build; the only place that knows transformers."""
