"""The one table of what is refused: how a good input is spoilt, which commands read it, in which words, and when."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.tiny import EXPERTS, rewrite, seeded, tokenizer, transformers

Spoil = Callable[[Path], Any]
"""Spoils a folder with a base, its experts, their rows and a recipe for each command."""
MERGE, BUILD, KIT = "merge", "build", "kit"
BOTH = (MERGE, BUILD, KIT)
LAYER = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
BERT_LAYER = "bert.encoder.layer.0.output.dense.weight"
BEFORE, READING = "before any work", "when the weights are read"


@dataclass(frozen=True)
class Refusal:
    """A row of the table; `words` is a pattern."""

    spoil: Spoil
    commands: tuple[str, ...]
    words: str
    when: str = BEFORE


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change a model's tensors in place, or give new ones."""

    def spoil(root: Path) -> None:
        rewrite(root / name / "model.safetensors", lambda tensors: change(tensors) or tensors)

    return spoil


def value(tensor: str, to: float, expert: str = "sms") -> Spoil:
    return weights(expert, lambda tensors: tensors[tensor].view(-1)[-1:].fill_(to) is None)


def random_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    return {name: torch.randn_like(tensor) * 0.2 for name, tensor in tensors.items()}


def config(expert: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / expert / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def recipe(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / f"{name}.yaml"
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    return spoil


def flip(bit: int, place: int) -> Spoil:
    """Flip a bit of a byte of an expert's file, counted from its end (negative) or its start."""

    def spoil(root: Path) -> None:
        path = root / "sms" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << bit
        path.write_bytes(content)

    return spoil


def cancel(method: str) -> Spoil:
    def change(content: dict[str, Any]) -> None:
        content["merge_method"] = method
        for model, weight in zip(content["models"], (1, -1, 0), strict=True):
            model["parameters"] = {"weight": weight}

    return recipe(KIT, change)


def cut(root: Path) -> None:
    file = root / "sms" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def text(name: str, content: str) -> Spoil:
    return lambda root: (root / name).write_text(content)


def recipe_text(old: str, new: str) -> Spoil:
    def spoil(root: Path) -> None:
        content = (root / "build.yaml").read_text()
        assert old in content
        (root / "build.yaml").write_text(content.replace(old, new))

    return spoil


def recipe_with(**changes: Any) -> Spoil:
    return recipe(BUILD, lambda content: content.update(changes))


def distilbert_base(root: Path) -> None:
    shutil.rmtree(root / "base")
    config = transformers.DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    seeded(transformers.DistilBertModel, config).save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")


def output_exists(root: Path) -> None:
    (root / "made" / "out").mkdir(parents=True)
    (root / "made" / "out" / "mine.txt").write_text("mine")


LLAMA: dict[str, Refusal] = {
    "NaN": Refusal(
        value(LAYER, float("nan")), BOTH, rf"sms'?: '{LAYER}' in .*sms/model\.safetensors.* has 1 NaN or Inf"
    ),
    "Inf": Refusal(
        value(LAYER, float("inf")), BOTH, rf"sms'?: '{LAYER}' in .*sms/model\.safetensors.* has 1 NaN or Inf"
    ),
    "NaN in an embedding": Refusal(
        value(EMBEDDING, float("nan")), (MERGE, KIT), rf"'{EMBEDDING}' in .* has 1 NaN or Inf values"
    ),
    "NaN in the base": Refusal(
        value(LAYER, float("nan"), "base"), BOTH, rf"base: '{LAYER}' in .*base/model\.s.* has 1 NaN"
    ),
    "weights that cancel": Refusal(cancel("linear"), (KIT,), "counts the base_model of linear as one of the models"),
    "weights that cancel in TIES": Refusal(
        cancel("ties"), (KIT,), "weights must not sum to zero when they are normalised"
    ),
    "unrelated base": Refusal(
        weights("base", random_weights),
        BOTH,
        r"is no fine-tune of this base: the cosine of their matrices must be at least 0\.5, found -?0\.0",
    ),
    "unrelated expert": Refusal(
        weights("sms", random_weights), BOTH, r"sms' is no fine-tune of this base: .* distance"
    ),
    "misspelt key": Refusal(
        recipe(BUILD, lambda r: r.update(exclusiv=r.pop("exclusive"))),
        (BUILD,),
        r"build\.yaml:\d+: unknown key 'exclusiv'; did you mean 'exclusive'\?$",
    ),
    "misspelt key of a merge": Refusal(
        recipe(MERGE, lambda r: r.update(dtpye="bfloat16")),
        (MERGE,),
        r"merge\.yaml:\d+: unknown key 'dtpye'; did you mean 'dtype'\?$",
    ),
    "misspelt key of mergekit's": Refusal(
        recipe(KIT, lambda r: r.update(base_modle="x")),
        (KIT,),
        r"kit\.yaml:\d+: unknown key 'base_modle'; did you mean 'base_model'\?$",
    ),
    "misspelt parameter": Refusal(
        lambda root: [recipe(n, lambda r: r["shared"].update(densty=0.2))(root) for n in (MERGE, BUILD)],
        (MERGE, BUILD),
        r"yaml:\d+: unknown key 'densty' under shared; did you mean 'density'\?$",
    ),
    "misspelt parameter of mergekit's": Refusal(
        recipe(KIT, lambda r: r["models"][1]["parameters"].update(wieght=1)),
        (KIT,),
        r"kit\.yaml:\d+: unknown key 'wieght' under models\.1\.parameters; did you mean 'weight'\?$",
    ),
    "flipped byte in the header": Refusal(
        flip(7, 12), BOTH, r"sms/model\.safetensors is no safetensors file: its header"
    ),
    "flipped bit of an exponent": Refusal(
        flip(6, -1),
        BOTH,
        r"sms'?: '.*' in .*sms/model\.safetensors.* (holds .*, more than .*; the file is damaged|NaN or Inf)",
        READING,
    ),
    "extra tensor": Refusal(
        weights("sms", lambda tensors: {**tensors, "model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}),
        BOTH,
        r"sms' has 1 tensors that .* lacks, first 'model\.layers\.2\.mlp\.up_proj\.weight'",
    ),
    "extra tensor beside the model": Refusal(
        weights("sms", lambda tensors: {**tensors, "score.weight": torch.ones(2, 2)}),
        BOTH,
        r"sms' has 1 tensors that .* lacks, first 'score\.weight'",
    ),
    "missing tensor": Refusal(
        weights("sms", lambda tensors: {k: v for k, v in tensors.items() if k != LAYER}),
        BOTH,
        rf"sms' lacks 1 of \d+ (tensors|parameters), first '{LAYER}'",
    ),
    "another shape": Refusal(
        weights("sms", lambda tensors: {**tensors, EMBEDDING: tensors[EMBEDDING][:-1].clone()}),
        BOTH,
        rf"sms'?: '{EMBEDDING}' has shape \[63, 16\]",
    ),
    "another rope": Refusal(
        config("sms", lambda c: c["rope_parameters"].update(rope_theta=5e5)),
        BOTH,
        r"sms' is another model: rope.* 10000\.0.* in base and .*500000\.0.* in sms; --allow-config-differences",
    ),
    "truncated file": Refusal(cut, BOTH, r"^\S*sms/model\.safetensors is truncated: tensor '.*' ends at byte"),
    "unknown method": Refusal(
        lambda root: [recipe(n, lambda r: r["shared"].update(method="tees"))(root) for n in (MERGE, BUILD)],
        (MERGE, BUILD),
        "yaml:.* must be pretrained or average or .* or ties or dare_linear or .*, found 'tees'$",
    ),
    "unknown method of mergekit's": Refusal(
        recipe(KIT, lambda r: r.update(merge_method="tees")),
        (KIT,),
        "'tees' is not supported; known are linear, task_arithmetic, ties, dare_linear, dare_ties, .*",
    ),
}
for number in (20, -0.5, 0):
    LLAMA[f"density {number}"] = Refusal(
        lambda root, number=number: [recipe(n, lambda r: r["shared"].update(density=number))(root) for n in BOTH[:2]],
        (MERGE, BUILD),
        rf"yaml:\d+: shared.*density: .*, found {number}$",
    )
    LLAMA[f"density {number} of mergekit's"] = Refusal(
        recipe(KIT, lambda r, number=number: r["models"][0]["parameters"].update(density=number)),
        (KIT,),
        rf"kit\.yaml:\d+: .*density: must be the fraction kept, in \(0, 1\], found {number}$",
    )


def of_build(spoil: Spoil, words: str, when: str = BEFORE) -> Refusal:
    return Refusal(spoil, (BUILD,), words, when)


BERT: dict[str, Refusal] = {
    "unknown key": of_build(
        recipe_text("exclusive:\n", "exclusive:\n  densty: 0.2\n"),
        r"build\.yaml:15: unknown key 'densty' under exclusive; did you mean 'density'\?$",
    ),
    "missing recipe": of_build(lambda f: (f / "build.yaml").unlink(), r"build\.yaml cannot be read: .*No such file"),
    "missing base": of_build(
        lambda f: shutil.rmtree(f / "base"),
        r"^base: no file or folder .*base; paths start from the recipe's",
    ),
    "missing weights": of_build(
        lambda f: (f / "sms" / "model.safetensors").unlink(),
        r"sms has neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "cut weights": of_build(
        lambda f: (f / "sms" / "model.safetensors").write_bytes((f / "sms" / "model.safetensors").read_bytes()[:-9]),
        r"sms/model\.safetensors is truncated",
    ),
    "missing router data": of_build(
        lambda f: (f / "ag.jsonl").unlink(), r"^experts\.ag\.router_data: no file or folder"
    ),
    "empty router data": of_build(
        text("ag.jsonl", ""),
        r"^experts\.ag\.router_data: .*ag\.jsonl is empty; the router needs inputs",
    ),
    "blank router data": of_build(text("ag.jsonl", "\n"), r"ag\.jsonl holds no rows"),
    "one row of router data": of_build(
        text("ag.jsonl", '{"text": "w5"}\n'),
        r"^experts\.ag\.router_data holds 1 row; the router needs at least 2 of every expert$",
    ),
    "router data that is no JSON": of_build(text("ag.jsonl", '{"text": "w5"}\nw6\n'), r"ag\.jsonl:2: not JSON"),
    "another architecture": of_build(
        config("sms", lambda c: c.update(model_type="distilbert")),
        r"'sms' is another model: model_type is 'bert' in base and 'distilbert' in sms",
    ),
    "unrelated weights": of_build(
        weights("sms", random_weights),
        r"^expert 'sms' is no fine-tune of this base: the cosine of their matrices must be at least 0\.5, found ",
    ),
    "missing tensor": of_build(
        weights("sms", without(BERT_LAYER)),
        r"^expert 'sms' lacks 1 of 41 parameters, first 'encoder\.layer\.0\.output\.dense\.weight'; was it fine-tuned",
    ),
    "extra tensor": of_build(
        weights("sms", lambda t: {**t, "bert.encoder.layer.9.bias": torch.ones(2)}),
        r"^expert 'sms' has 1 tensors that the base lacks, first 'bert\.encoder\.layer\.9\.bias'; was it fine-tuned",
    ),
    "NaN where relatedness is read": of_build(
        value(BERT_LAYER, float("nan")),
        r"^expert 'sms': 'bert\.encoder\.layer\.0\.output\.dense\.weight' in .* has 1 NaN or Inf values",
    ),
    "NaN elsewhere": of_build(
        value("bert.embeddings.word_embeddings.weight", float("nan")),
        r"^expert 'sms': 'bert\.embeddings\.word_embeddings\.weight' in .* has 1 NaN or Inf values, first at index",
        READING,
    ),
    "NaN in a head": of_build(
        value("classifier.bias", float("nan")),
        r"^expert 'sms': 'classifier\.bias' in .* has 1 NaN or Inf values, first at index \(2,\)",
    ),
    "NaN in the base": of_build(
        value("embeddings.LayerNorm.weight", float("nan"), "base"),
        r"^base: 'embeddings\.LayerNorm\.weight' in .* has 1 NaN or Inf values",
        READING,
    ),
    "head of no known class": of_build(
        config("sms", lambda c: c.update(architectures=["BertForNothing"])),
        r"config.json must name a transformers class in architectures, found \['BertForNothing'\]$",
    ),
    "head that does not fit its class": of_build(
        weights("sms", lambda t: {**t, "extra.weight": torch.ones(2)}),
        r"^expert 'sms' has 1 tensors that the base lacks, first 'extra.weight'; was it fine-tuned from the same base",
    ),
    "single expert": of_build(
        recipe_with(experts={"sms": {"model": "sms", "router_data": "sms.jsonl"}}),
        r"build\.yaml:2: experts: a twin needs at least two experts, found 1",
    ),
    "two experts of one name": of_build(
        recipe_text("  sms:\n", "  trec:\n"),
        r"build\.yaml:6: key 'trec' stands twice, first on line 3; names must differ",
    ),
    "negative rank": of_build(
        recipe_with(exclusive={"rank": -1}),
        r"exclusive\.rank: input should be greater than .* found -1",
    ),
    "fractional rank": of_build(recipe_with(exclusive={"rank": 1.5}), r"exclusive\.rank: .* valid integer, found 1\.5"),
    "budget of nothing": of_build(
        recipe_with(exclusive={"budget": 0}), r"exclusive\.budget: .* greater than 0, found 0"
    ),
    "budget too small": of_build(
        recipe_with(exclusive={"budget": 0.05}),
        r"^exclusive\.budget: 0\.05 x [\d,]+ bytes cannot hold the biases and norms of 3 experts; it must be at ",
    ),
    "layer that is not there": of_build(
        recipe_with(router={"features": "layer:9"}),
        r"^router\.features: layer 9 must be at most 2, the model's last$",
    ),
    "base without tokenizer": of_build(
        lambda f: [path.unlink() for path in (f / "base").glob("tokenizer*")],
        "^base .*base has no tokenizer, and router data are rows of text; put its files there",
    ),
    "missing expert": of_build(lambda f: shutil.rmtree(f / "sms"), r"experts\.sms\.model: no file or folder .*/sms;"),
    "wrong base: different architecture": of_build(
        distilbert_base,
        r"expert 'trec' is a 'bert' model, the base is 'distilbert'; experts must be fine-tuned from the base",
    ),
    "two experts whose names differ only in case": of_build(
        recipe_with(experts={n: {"model": "sms", "router_data": "sms.jsonl"} for n in ("sms", "SMS")}),
        r"build\.yaml:\d+: experts: experts' names must differ in more than case",
    ),
    "output folder that exists": of_build(output_exists, r"/out exists already; choose another path, or overwrite it"),
    "rows with a key twice": of_build(
        text("ag.jsonl", '{"text": "w5"}\n{"text": "w5", "text": "w6"}\n'), r"ag\.jsonl:2: .*'text' stands twice"
    ),
    "rows with a number beyond all": of_build(
        text("ag.jsonl", '{"text": "w5", "n": 1e999}\n'), r"ag\.jsonl:1: .*too large"
    ),
    "rows nested without end": of_build(
        text("ag.jsonl", '{"text": "w5", "n": ' + "[" * 100_000 + "]" * 100_000 + "}\n"), r"ag\.jsonl:1: .*too deep"
    ),
    "rows of words that nobody knows": of_build(
        text("ag.jsonl", '{"text": "qqq"}\n' * 3), r"to the base's tokenizer, its texts are every token is \[UNK\]"
    ),
    "code in the folder of the base": of_build(
        config("base", lambda c: c.update(architectures=["Mine"], auto_map={"AutoModel": "mine.Mine"})),
        r"by auto_map in config.json its class is Python code of the folder, which is never run here",
    ),
    "a head that answers no rows": of_build(
        lambda f: [
            seeded(transformers.BertForMaskedLM, transformers.BertConfig.from_pretrained(f / "base")).save_pretrained(
                f / n
            )
            for n in EXPERTS
        ],
        r"expert '\w+' is a BertForMaskedLM",
    ),
    "quantised": of_build(
        config("sms", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        r"sms is quantised \(quantization_config of gptq in config\.json\): its numbers are codes",
    ),
    "more positions than there are": of_build(
        recipe_with(max_length=4096), r"max_length: the model has positions for 32 tokens"
    ),
}

TABLE = {"llama": LLAMA, "bert": BERT}
"""By the family of models that is spoilt."""
