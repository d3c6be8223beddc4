"""A suite of language models is judged by what they write: tiny Llamas, LoRA experts, texts beside their references."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from twinmerge.errors import MismatchError, RecipeError
from twinmerge.eval.harness import run_suite
from twinmerge.eval.metrics import bootstrap, score
from twinmerge.eval.seed import first_line
from twinmerge.eval.suite import Suite

SUITE = """
name: written
root: .
base: base
experts: "{task}"
data: "{task}.{split}.jsonl"
unseen_data: "{task}.{split}.jsonl"
tasks: {ag: {metric: exact_match}, sms: {metric: exact_match}, trec: {metric: chrf}}
unseen: {far: {}}
max_new_tokens: 4
shared: {method: average}
router: {features: all, gate: hard, fallback: null}
contestants:
  pretrained: {title: base, kind: static, shared: {method: pretrained}}
  experts: {title: experts, kind: experts}
  top1: {title: top-1, kind: top1}
  average: {title: average, kind: static, shared: {method: average}}
  one: {title: the expert of sms for all, kind: model, model: sms}
  whole: {title: whole, kind: twin, shared: {method: average}, exclusive: {rank: 9999}}
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Three adapters, and rows whose right answer is what the merged adapter writes, so that experts score 1."""
    root = tmp_path_factory.mktemp("written")
    tiny.llama().save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    for name in tiny.EXPERTS:
        merged = tiny.make_adapter(
            root, name, tiny.llama(), r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        asked = [row["text"] for row in tiny.text_rows(name, 30)]
        rows = [{"prompt": text, "label": said} for text in asked if (said := _written(merged, root, text))]
        assert len(rows) > 12  # a model may stop at once, and nothing is no label
        for split, part in {"router": rows[:6], "validation": rows[6:8], "test": rows[8:]}.items():
            _write(root / f"{name}.{split}.jsonl", part)
    prompt = "w7 w9 w30"
    _write(root / "far.test.jsonl", [{"prompt": prompt, "label": _written(tiny.llama().eval(), root, prompt)}])
    (root / "suite.yaml").write_text(SUITE)
    return Suite.load(root / "suite.yaml")


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _written(model: Any, root: Path, prompt: str) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "base")
    inputs = tokenizer([prompt], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(first_line(tokenizer.decode(found, skip_special_tokens=True)))


def test_experts_and_a_twin_of_full_rank_write_what_each_expert_writes(suite: Suite, tmp_path: Path) -> None:
    result = run_suite(suite, tmp_path)
    found = {one.name: one for one in result.summaries}
    assert found["experts"].normalized_oracle_head.value == 1.0
    assert found["experts"].tasks["trec"].expert == 1.0
    assert found["experts"].normalized_routed is None
    sent_right = {task: row[task] / sum(row.values()) for task, row in (found["whole"].confusion or {}).items()}
    for name in ("top1", "whole"):
        scores = found[name].tasks
        assert all(scores[task].oracle_head >= share - 1e-9 for task, share in sent_right.items()), (scores, sent_right)
        assert all(one.routed == one.oracle_head for one in scores.values())
    assert found["one"].tasks["sms"].oracle_head == 1.0
    assert found["one"].tasks["ag"].oracle_head < 1.0
    assert found["pretrained"].unseen == {"far": 1.0}
    assert found["pretrained"].kind == "base"
    assert found["average"].bytes["exclusive"] == 0
    adapters = sum(file.stat().st_size for file in suite.root_of(0).glob("*/adapter_model.safetensors"))
    assert result.expert_bytes == adapters + result.base_bytes  # without the base adapters answer nothing
    assert found["experts"].bytes["shared"] == found["top1"].bytes["shared"] == result.expert_bytes


def test_an_expert_that_gives_labels_is_refused_by_name(suite: Suite, tmp_path: Path) -> None:
    family = tiny.make_family(tmp_path, tiny.bert(), transformers.BertForSequenceClassification)
    for name in family.experts:
        for split in ("router", "validation", "test"):
            _write(
                tmp_path / f"{name}.{split}.jsonl", [{"prompt": "w5", "label": "w6"}, {"prompt": "w7", "label": "w8"}]
            )
    (tmp_path / "suite.yaml").write_text(SUITE.replace("unseen: {far: {}}\n", ""))
    with pytest.raises(MismatchError, match="expert 'ag': the suite judges texts that are written.*gives label"):
        run_suite(Suite.load(tmp_path / "suite.yaml"), tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("sms: {metric: exact_match}", "sms: {metric: accuracy}", "all by texts .*found accuracy, chrf, exact_match"),
        ("kind: model, model: sms", "kind: model", "model belongs to kind model"),
        (
            "exclusive: {rank: 9999}",
            "exclusive: {rank: 9999}, groups: 2",
            "contestants.whole: groups, scalings and per_task",
        ),
    ],
)
def test_a_suite_that_mixes_texts_and_labels_is_refused(tmp_path: Path, old: str, new: str, match: str) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE.replace(old, new))
    with pytest.raises(RecipeError, match=match):
        Suite.load(tmp_path / "suite.yaml")


def test_kind_model_is_of_language_models(tmp_path: Path) -> None:
    labels = SUITE.replace("exact_match", "accuracy").replace("chrf", "accuracy")
    (tmp_path / "suite.yaml").write_text(labels)
    with pytest.raises(RecipeError, match="kind model is for texts"):
        Suite.load(tmp_path / "suite.yaml")


def test_first_line_is_the_first_that_holds_anything() -> None:
    assert first_line("\n  \n 47 \nResult: 3") == "47"
    assert first_line(" ") == ""


def test_chrf_is_the_mean_over_rows_of_what_sacrebleu_says_of_each() -> None:
    from sacrebleu.metrics.chrf import CHRF

    labels, predicted = ["Es una emergencia.", "el gato", "el gato"], ["Es emergencia.", "el pato", "el gato"]
    each = [CHRF().sentence_score(mine, [right]).score / 100 for mine, right in zip(predicted, labels, strict=True)]
    assert score("chrf", labels, predicted) == pytest.approx(sum(each) / 3)
    assert score("exact_match", labels, predicted) == pytest.approx(1 / 3)
    resampled = bootstrap("chrf", labels, [predicted], resamples=50)
    assert min(each) <= resampled.min() <= resampled.max() <= max(each)
