"""Run by test_compile.py in a process of its own, where no type checker wraps the functions that dynamo traces."""

import copy
import sys

import torch
from transformers import BertConfig, BertModel

from twinmerge.hf.model import TwinModel
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense

INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]),
}
GATES = (
    torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    torch.eye(3)[[0, 1, 2, 0]],
    torch.tensor([[0.5, 0.5, 0.0]]).expand(4, -1),
)


def main() -> None:
    """Compare a compiled twin with itself before, under several gates."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    backbone = BertModel(config, add_pooling_layer=False).eval()
    exclusive = {
        f"e{expert}": {
            name: Dense(0.1 * torch.randn(value.shape))
            if value.ndim == 1
            else LowRank(0.3 * torch.randn(value.shape[0], 1 + expert), 0.3 * torch.randn(1 + expert, value.shape[1]))
            for name, value in backbone.named_parameters()
            if "position" not in name
        }
        for expert in range(3)
    }
    for mode in ("all", "gather", "merge"):
        twin = TwinModel(copy.deepcopy(backbone), exclusive)
        expected = [twin.encode(gate, mode=mode, **INPUTS)[0] for gate in GATES]
        torch.compiler.reset()
        twin.backbone.compile(backend="eager")
        for gate, want in zip(GATES, expected, strict=True):
            for _ in range(2):
                found = twin.encode(gate, mode=mode, **INPUTS)[0]
                torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)
        captured = torch._dynamo.utils.counters["frames"]["ok"]
        assert captured > 0, f"dynamo captured nothing in mode {mode}"
        sys.stdout.write(f"{captured} frames captured\n")


if __name__ == "__main__":
    main()
