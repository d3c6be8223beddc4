"""Makes synthetic Llama checkpoints of 8, 120 or 500 million parameters: a base and experts, bf16 safetensors.

Every expert is the base plus noise in every tensor plus a low-rank change of its projections, so that trimming and
decomposing have something to find. The same seed gives the same bytes.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SIZES = {
    "8m": {"vocab": 2048, "hidden": 256, "inner": 688, "layers": 6, "heads": 4},
    "120m": {"vocab": 16384, "hidden": 768, "inner": 2048, "layers": 13, "heads": 12},
    "500m": {"vocab": 32000, "hidden": 1280, "inner": 3456, "layers": 21, "heads": 20},
}
NOISE, CHANGE, RANK = 0.002, 0.01, 8


def make(folder: Path, size: str, experts: int = 4, seed: int = 0) -> Path:
    """Write `folder/size/base` and `folder/size/expertN`, unless they are there; gives `folder/size`."""
    root = folder / size
    if (root / "complete").exists():
        return root
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds, which a benchmark would count

    sizes = SIZES[size]
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.bfloat16()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _save(model, root / "base", sizes["vocab"])
    for expert in range(experts):
        generator = torch.Generator().manual_seed(seed * 1000 + expert + 1)
        for name, tensor in model.state_dict().items():
            changed = base[name].float() + NOISE * torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 2 and "proj" in name:
                up = torch.randn(tensor.shape[0], RANK, generator=generator)
                changed += CHANGE / RANK**0.5 * (up @ torch.randn(RANK, tensor.shape[1], generator=generator))
            tensor.copy_(changed)
        _save(model, root / f"expert{expert}", sizes["vocab"])
    (root / "complete").touch()
    return root


def _save(model: "LlamaForCausalLM", folder: Path, vocabulary: int) -> None:
    model.save_pretrained(folder, max_shard_size="512MB")
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for token, i in special.items()
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "unk_token": "<unk>",
            "vocab": special | {f"w{i}": i for i in range(len(special), vocabulary)},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["120m", "500m"])
    chosen = options.parse_args()
    for chosen_size in chosen.sizes:
        print(make(chosen.folder, chosen_size))
