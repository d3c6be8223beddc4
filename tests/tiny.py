"""Tiny models with random weights, made from configs: a base, its experts and rows that belong to them."""

import json
import string
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from twinmerge.files.checkpoint import TensorSpec
from twinmerge.files.writer import CheckpointWriter
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.kinds import parameter_kinds
from twinmerge.hf.loading import skeleton
from twinmerge.models.source import Model
from twinmerge.twin.plan import Kind, Plan, make_plan
from twinmerge.twin.recipe import Recipe

transformers.utils.logging.disable_progress_bar()

EXPERTS = ("trec", "sms", "ag")
"""Not in the order of the alphabet, which is the gate's: ag, sms, trec."""
GATE_ORDER = tuple(sorted(EXPERTS))
LABELS = {"trec": 2, "sms": 3, "ag": 4}
VOCABULARY, POSITIONS = 64, 32
WORDS = 18
"""Words that only one expert's rows use."""


@dataclass(frozen=True)
class Family:
    """A base and experts fine-tuned from it, in folders under `root`, with router data beside them."""

    root: Path
    experts: tuple[str, ...] = EXPERTS

    @property
    def base(self) -> Path:
        return self.root / "base"

    def recipe(self, **settings: Any) -> Recipe:
        """A recipe for all experts; settings are sections of it."""
        sources = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in self.experts}
        return Recipe(**{"base": "base", "experts": sources, "root": self.root, **settings})

    def plan(self, **settings: Any) -> Plan:
        """The recipe's plan; everything whole unless settings say otherwise."""
        settings.setdefault("exclusive", {"rank": 64, "embeddings": "exclusive"})
        return make_plan(self.recipe(**settings), LIBRARY, kinds_of_model)


def kinds_of_model(model: Model) -> dict[str, Kind]:
    return kinds_of(model.checkpoint.path, model.layout.cls)


def kinds_of(folder: Path, cls: str | None = None) -> dict[str, Kind]:
    """`parameter_kinds`, computed once for every config."""
    key = (folder / "config.json").read_text(), cls
    if key not in _KINDS:
        _KINDS[key] = parameter_kinds(skeleton(folder, cls))
    return _KINDS[key]


_KINDS: dict[tuple[str, str | None], dict[str, Kind]] = {}


def text_rows(expert: str, count: int = 24) -> list[dict[str, str]]:
    """Rows of an expert's own words, of different lengths."""
    first = 5 + WORDS * EXPERTS.index(expert)
    return [{"text": " ".join(f"w{first + (7 * i + j * j) % WORDS}" for j in range(2 + i % 5))} for i in range(count)]


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a word: w5 is token 5."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(5, VOCABULARY))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_max_length=POSITIONS,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )


def by_letters() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as language models have them; one of whole words knows no strings within."""
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Ġ", *string.ascii_lowercase, *string.digits]
    made = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[SEP]")


def make_family(
    root: Path,
    base: PreTrainedModel,
    expert_class: type[PreTrainedModel],
    *,
    experts: tuple[str, ...] = EXPERTS,
    scale: float = 0.01,
    padding_side: str = "right",
    rows: Callable[[str], list[dict[str, str]]] = text_rows,
) -> Family:
    """Write a base and its experts: every parameter that some layer can gate moves, heads are each expert's own."""
    base.save_pretrained(root / "base")
    tokenizer(padding_side).save_pretrained(root / "base")
    kinds = kinds_of(root / "base")
    for seed, name in enumerate(experts):
        torch.manual_seed(100 + seed)
        config = type(base.config).from_pretrained(root / "base")
        if expert_class is not type(base):
            config.num_labels = LABELS[name]
        model = expert_class(config)
        body = model.base_model if expert_class is not type(base) else model
        shared = (base.base_model if body is not model else base).state_dict()
        prefix = "" if body is model or base.base_model is base else f"{base.base_model_prefix}."
        body.load_state_dict(
            {
                k: v + scale * torch.randn_like(v) if kinds.get(prefix + k, "static") != "static" else v
                for k, v in shared.items()
                if k in body.state_dict()
            }
        )
        model.tie_weights()
        model.to(base.dtype).save_pretrained(root / name)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
    return Family(root, experts)


BASES: Mapping[str, tuple[Callable[[], PreTrainedModel], str]]
"""Family -> how its base is made, the class of its experts."""


def families(root: Path) -> Callable[[str], Family]:
    """Families by name, each written once under `root`."""

    @cache
    def family(name: str) -> Family:
        make, expert_class = BASES[name]
        side = "left" if expert_class.endswith(("CausalLM", "LMHeadModel")) else "right"
        return make_family(root / name, make(), getattr(transformers, expert_class), padding_side=side)

    return family


def random_gate(rows: int, experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that sum to 1, every expert in them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, experts, generator=generator, dtype=dtype).add(0.1).softmax(dim=1)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Change the tensors of a safetensors file in place."""
    from safetensors.torch import load_file, save_file

    tensors = dict(change(load_file(path)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 10**9) -> Path:
    """A folder of weights alone."""
    folder.mkdir(exist_ok=True)
    specs = [TensorSpec(name, tuple(t.shape), t.dtype, Path("unused"), t.nbytes) for name, t in tensors.items()]
    writer = CheckpointWriter.plan(specs, folder, max_shard_bytes=max_shard_bytes)
    writer.allocate()
    for name, tensor in tensors.items():
        writer.write(name, 0, tensor.reshape(-1))
    writer.finish()
    return folder


# ---- bases; float32, a few thousand numbers each


def seeded(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model with the same random weights every time."""
    torch.manual_seed(0)
    model: PreTrainedModel = cls(config).eval()
    return model


def text_config(cls: Any, **settings: Any) -> Any:
    """hidden 16, two layers, two heads."""
    return cls(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        **settings,
    )


def bert() -> PreTrainedModel:
    return seeded(transformers.BertModel, text_config(transformers.BertConfig))


def llama() -> PreTrainedModel:
    config = text_config(
        transformers.LlamaConfig, num_key_value_heads=1, pad_token_id=0, eos_token_id=3, bos_token_id=2
    )
    return seeded(transformers.LlamaForCausalLM, config)


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
    )
    return seeded(transformers.GPT2LMHeadModel, config)


def distilbert() -> PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=POSITIONS
    )
    return seeded(transformers.DistilBertModel, config)


def roberta() -> PreTrainedModel:
    config = text_config(transformers.RobertaConfig, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    return seeded(transformers.RobertaForMaskedLM, config)


BASES = {
    "bert": (bert, "BertForSequenceClassification"),
    "distilbert": (distilbert, "DistilBertForSequenceClassification"),
    "roberta": (roberta, "RobertaForSequenceClassification"),
    "llama": (llama, "LlamaForCausalLM"),
    "gpt2": (gpt2, "GPT2LMHeadModel"),
}


# ---- LoRA


def make_adapter(
    root: Path, name: str, model: PreTrainedModel, rows: list[dict[str, str]] | None = None, **settings: Any
) -> PreTrainedModel:
    """Write a PEFT adapter with random factors to `root/name`; returns the model with the adapter merged in."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(len(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about tied weights and about transformers
        adapted: Any = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:  # factors, biases, modules to save
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.save_pretrained(root / name)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or text_rows("trec")))
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.eval()


def adapter_family(root: Path) -> tuple[Family, dict[str, PreTrainedModel]]:
    """BERT and three LoRA experts, each with another form of adapter and its own head; and the same, merged."""
    base = bert()
    base.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    forms: dict[str, dict[str, Any]] = {
        "trec": {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        "sms": {
            "r": 4,
            "target_modules": ["query", "dense", "word_embeddings"],
            "rank_pattern": {"layer.1.attention.self.query": 2},
            "alpha_pattern": {"query": 9},
            "use_rslora": True,
            "bias": "lora_only",
            "task_type": "SEQ_CLS",
        },
        "ag": {"r": 3, "target_modules": ["key", "dense"], "modules_to_save": ["classifier", "LayerNorm"]},
    }
    merged = {}
    for name, settings in forms.items():
        config = type(base.config).from_pretrained(root / "base", num_labels=LABELS[name])
        model = seeded(transformers.BertForSequenceClassification, config)
        model.bert.load_state_dict(base.state_dict())
        merged[name] = make_adapter(root, name, model, text_rows(name), **settings)
    return Family(root), merged
