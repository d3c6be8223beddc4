"""One session of the program for each kind of expert: init, plan, build, inspect, verify, predict, export, and what
plain transformers and PEFT load of it."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from tests import tiny
from tests.hf.test_seq2seq import t5
from tests.jobs import test_images as images
from tests.jobs.test_chats import OTHER, TEMPLATE, chat
from tests.tiny import EXPERTS
from twinmerge.cli import main

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time
NAME = EXPERTS[1]


def qwen2() -> transformers.PreTrainedModel:
    config = tiny.text_config(transformers.Qwen2Config, num_key_value_heads=1, tie_word_embeddings=True)
    config.max_position_embeddings = 256  # letters are many
    return tiny.seeded(transformers.Qwen2ForCausalLM, config)


def adapters(root: Path, base: Callable[[], transformers.PreTrainedModel], targets: list[str], task: str) -> None:
    """A base and LoRA experts on it."""
    base().save_pretrained(root / "base")
    tiny.tokenizer("left").save_pretrained(root / "base")
    for name in EXPERTS:
        model = type(base()).from_pretrained(root / "base")
        rows = tiny.text_rows(name)
        tiny.make_adapter(root, name, model, rows, r=2, target_modules=targets, task_type=task)


def chats(root: Path) -> None:
    adapters(root, qwen2, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM")
    for folder, template in (("base", TEMPLATE), (NAME, OTHER)):
        spelled = tiny.by_letters()  # whose bytes any class of tokenizer reads alike
        spelled.chat_template = template
        spelled.save_pretrained(root / folder)
    for name in EXPERTS:
        rows = [{"messages": chat(row["text"], "w7 w8")} for row in tiny.text_rows(name)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def whole(root: Path) -> None:
    make, cls = tiny.BASES["gpt2"]
    tiny.make_family(root, make(), getattr(transformers, cls), padding_side="left")


@dataclass(frozen=True)
class Kind:
    """Experts of one kind: how they are made, and their class in plain transformers."""

    make: Callable[[Path], Any]
    cls: str
    adapters: bool = False
    images: bool = False


KINDS = {
    "qwen2, LoRA, chats": Kind(chats, "Qwen2ForCausalLM", adapters=True),
    "t5, LoRA": Kind(
        lambda root: adapters(root, t5, ["q", "v", "wo"], "SEQ_2_SEQ_LM"),
        "T5ForConditionalGeneration",
        adapters=True,
    ),
    "gpt2": Kind(whole, "GPT2LMHeadModel"),
    "vit": Kind(lambda root: images.make(root, "vit"), "ViTForImageClassification", images=True),
    "resnet": Kind(lambda root: images.make(root, "resnet"), "ResNetForImageClassification", images=True),
    "clip": Kind(lambda root: images.make(root, "clip"), "CLIPVisionModel", images=True),
}


def expert(kind: Kind, folder: Path) -> Any:
    """The expert without twinmerge."""
    cls: Any = getattr(transformers, kind.cls)
    if not kind.adapters:
        return cls.from_pretrained(folder).eval()
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about tied weights and about transformers
        return PeftModel.from_pretrained(cls.from_pretrained(folder.parent / "base"), folder).merge_and_unload().eval()


def answered(kind: Kind, model: Any, folder: Path, row: dict[str, Any]) -> Any:
    """A model's answer to a row without twinmerge: what it writes, or (values, ...) of an image."""
    if kind.images:
        processor = transformers.AutoImageProcessor.from_pretrained(folder.parent / "base")
        with torch.inference_mode():
            out = model(**processor(images=Image.open(folder.parent / row["image"]), return_tensors="pt"))
        return out.logits[0].softmax(dim=0) if "logits" in out else out.pooler_output[0]
    own = folder if (folder / "tokenizer.json").is_file() else folder.parent / "base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(own)
    text, special = row.get("text"), True
    if text is None:
        text, special = (
            tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True),
            False,
        )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    prompt = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, prompt:]
    return tokenizer.decode(ids, skip_special_tokens=True)


def said(kind: Kind, answer: dict[str, Any], found: Any) -> None:
    """The twin's answer is what was found without it."""
    if not kind.images:
        assert answer["continuation"] == found
    elif "score" in answer:
        assert answer["score"] == pytest.approx(float(found.max()), abs=1e-4)
    else:
        assert torch.allclose(torch.tensor(answer["embedding"]), found, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_session(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]
    monkeypatch.chdir(tmp_path)
    kind.make(tmp_path)
    capsys.readouterr()
    assert main(["init", "base", *EXPERTS]) == 0
    draft = capsys.readouterr().out
    assert "missing" not in draft
    Path("recipe.yaml").write_text(draft.replace("{budget: 0.06}", "{rank: 10000, embeddings: exclusive}"))
    for command in (
        ["plan", "recipe.yaml"],
        ["build", "recipe.yaml", "--out", "twin"],
        ["inspect", "twin"],
        ["verify", "twin"],
    ):
        assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / f"{NAME}.jsonl").read_text().splitlines()][:3]
    rows = [{"messages": row["messages"][:1]} if "messages" in row else row for row in rows]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--input", "asked.jsonl", "--max-new-tokens", "5"]
    assert main(["predict", "twin", *options, "--output", "routed.jsonl"]) == 0
    assert main(["predict", "twin", *options, "--expert", NAME, "--output", "alone.jsonl"]) == 0
    assert main(["export", "twin", "--to", "dense", "--expert", NAME, "--out", "dense"]) == 0
    assert main(["export", "twin", "--to", "peft", "--out", "adapters"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    routed, alone = (
        [json.loads(line) for line in Path(file).read_text().splitlines()] for file in ("routed.jsonl", "alone.jsonl")
    )
    theirs = expert(kind, tmp_path / NAME)
    dense: Any = getattr(transformers, kind.cls).from_pretrained("dense").eval()
    for row, answer, by_router in zip(rows, alone, routed, strict=True):
        said(kind, answer, answered(kind, theirs, tmp_path / NAME, row))
        said(kind, answer, answered(kind, dense, tmp_path / NAME, row))
        assert set(by_router["gate"]) == set(EXPERTS)
    adapter = json.loads((tmp_path / "adapters" / NAME / "adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA"
