"""Gives a merged model its tokenizer and its chat template, as mergekit's recipes name them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twinmerge.files.strict_json import read_json

_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
)
"""What a tokenizer's files are called."""
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class TokenizerChoice:
    """Whose tokenizer a merged model gets."""

    source: Path | None = None
    """The model's whose it is; None: the reference's."""
    union: bool = False
    """Whether it must know the tokens of all models."""
    template: str | None = None
    """Of chats: a Jinja template, or `auto`, the one that most models have; None leaves the tokenizer's."""

    @property
    def alike(self) -> bool:
        """Whether all models must have one vocabulary: embeddings are merged row by row and none is moved."""
        return self.union or self.source is not None


def write_tokenizer(choice: TokenizerChoice, models: Sequence[Path], folder: Path) -> None:
    """Put the chosen tokenizer and template in the place of the reference's.

    Args:
        choice: what the recipe says.
        models: all of the merge, in the recipe's order.
        folder: holds the reference's files.
    """
    if choice.source is not None:
        for pattern in (*_FILES, _TEMPLATE):
            for file in folder.glob(pattern):
                file.unlink()
            for file in choice.source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    template = _usual_template(models) if choice.template == "auto" else choice.template
    if template is not None:
        config = folder / _CONFIG
        content = {**(read_json(config) if config.exists() else {}), "chat_template": template}
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / _TEMPLATE).unlink(missing_ok=True)


def missing_template(choice: TokenizerChoice, models: Sequence[Path]) -> str | None:
    """What a user should know where no model has a template to choose."""
    if choice.template != "auto" or _usual_template(models) is not None:
        return None
    return "chat_template auto: no model has a chat template, so the result keeps none"


def _usual_template(models: Sequence[Path]) -> str | None:
    """The one that most models have; of equally many the first model's."""
    known = Counter(found for model in models if (found := template_of(model)) is not None)
    return known.most_common(1)[0][0] if known else None


def template_of(model: Path) -> str | None:
    """The chat template of a model's folder, the default one of several."""
    if (model / _TEMPLATE).is_file():
        return (model / _TEMPLATE).read_text(encoding="utf-8")
    config = model / _CONFIG
    found = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        return next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found
