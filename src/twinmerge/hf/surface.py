"""What tools expect of a transformers model, said of a twin: its configs are the shared expert's."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig


class Surface(nn.Module):
    """Read by transformers' pipelines, trainers and lm-eval; nothing here can be set."""

    backbone: Any

    @property
    def config(self) -> PretrainedConfig:
        """The shared expert's; labels are the experts' own, in the configs of `heads`."""
        found: PretrainedConfig = self.backbone.config
        return found

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The shared expert's; `generate` applies each row's expert's own. None of a model that writes no texts."""
        return getattr(self.backbone, "generation_config", None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = self.backbone.dtype
        return found

    @property
    def main_input_name(self) -> str:
        """What it reads: `input_ids`, `pixel_values`."""
        return str(self.backbone.main_input_name)

    def can_generate(self) -> bool:
        """Whether `generate` writes texts."""
        return bool(self.backbone.can_generate())

    def get_input_embeddings(self) -> nn.Module:
        """The shared expert's."""
        found: nn.Module = self.backbone.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """The shared expert's."""
        found: nn.Module | None = self.backbone.get_output_embeddings()
        return found

    def tie_weights(self) -> None:
        """Nothing to do: what is tied is tied since loading."""
