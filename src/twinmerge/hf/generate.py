"""Writes texts under the settings of the expert that writes them."""

from transformers import GenerationConfig


def end_ids(settings: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a text; none where only its length does."""
    ends = settings.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
