"""Knows how many positions a model serves, and whether it looks them up in a table."""

import re

from transformers import PreTrainedModel

_POSITIONS = re.compile(r"(^|\.)(wpe|\w*(?<!rel_)(?<!relative_)pos(ition(al)?s?)?_embed\w*|embed_positions?)(\.|$)")
"""Names of modules that hold a row for every absolute position."""
_MOST_OFFSET = 8
"""Rows that stand for no position, at most, in a table of a size that config.json does not name."""


def position_table(backbone: PreTrainedModel) -> int | None:
    """Tokens that a model's tables of absolute positions serve, None where it has none.

    Some tables begin with rows of no position: where positions are counted on from the padding's index (RoBERTa), or
    from an offset (BART, OPT).
    """
    said = getattr(backbone.config.get_text_config(), "max_position_embeddings", None) or 0
    reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    served = []
    for name, module in reader.named_modules():
        if _POSITIONS.search(name) and hasattr(module, "padding_idx") and hasattr(module, "weight"):
            rows, first = len(module.weight), getattr(module, "offset", None)
            if first is None and module.padding_idx is not None:
                first = module.padding_idx + 1
            if first is None:
                first = rows - said if said <= rows <= said + _MOST_OFFSET else 0
            served.append(rows - first)
    return min(served, default=None)


def reads_position_table(backbone: PreTrainedModel) -> bool:
    """Whether a decoder looks its positions up in a table.

    Not every such class leaves padding on the left out of its count: its prompts share a batch of one length only.
    """
    return not backbone.config.is_encoder_decoder and position_table(backbone) is not None
