"""Every kind of head answers as transformers' own pipeline, or the expert's own model, does."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from tests import tiny
from twinmerge.errors import DataError, MismatchError
from twinmerge.hf.answers import answers_of, label_of
from twinmerge.hf.inputs import tokenize
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict
from twinmerge.twin.recipe import Recipe

Row = dict[str, Any]
TAGS = {0: "O", 1: "B-PER", 2: "I-PER"}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "spam": ("SequenceClassification", {"num_labels": 3, "id2label": {0: "ham", 1: "spam", 2: "eggs"}}),
    "stars": ("SequenceClassification", {"num_labels": 1}),
    "axes": ("SequenceClassification", {"num_labels": 2, "problem_type": "regression"}),
    "topics": ("SequenceClassification", {"num_labels": 4, "problem_type": "multi_label_classification"}),
    "names": ("TokenClassification", {"num_labels": 3, "id2label": TAGS}),
    "asks": ("QuestionAnswering", {}),
}
"""An expert for every kind of head: the end of its class's name, its config."""
TEXTS = [row["text"] for name in tiny.EXPERTS for row in tiny.text_rows(name, 3)]


def tokenizer() -> Any:
    """Of one token a word, between [CLS] and [SEP]."""
    made = tiny.tokenizer()
    made.cls_token, made.sep_token = "[CLS]", "[SEP]"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def family(root: Path, base: PreTrainedModel, prefix: str, heads: dict[str, tuple[str, dict[str, Any]]]) -> Recipe:
    """A base and an expert for every head, near it."""
    base.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for seed, (name, (ending, settings)) in enumerate(heads.items()):
        torch.manual_seed(seed)
        config = type(base.config).from_pretrained(root / "base", **settings)
        model = getattr(transformers, f"{prefix}For{ending}")(config)
        body = {k: v + 0.02 * torch.randn_like(v) for k, v in base.base_model.state_dict().items()}
        model.base_model.load_state_dict({k: v for k, v in body.items() if k in model.base_model.state_dict()})
        for parameter in [p for n, p in model.named_parameters() if not n.startswith(model.base_model_prefix)]:
            torch.nn.init.normal_(parameter, std=2.0)  # answers that differ
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        rows = tiny.text_rows(tiny.EXPERTS[seed % 3], 8)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in heads}
    exclusive = {"rank": 64, "embeddings": "exclusive"}
    return Recipe(base="base", experts=sources, exclusive=exclusive, router={"features": "last"}, root=root)


SEQUENCE, TOKEN = ("spam", "stars", "axes", "topics"), ("names", "asks")
MADE: dict[str, tuple[Callable[[], PreTrainedModel], str, list[tuple[str, ...]]]] = {
    "bert": (tiny.bert, "Bert", [SEQUENCE, TOKEN]),  # the second have no pooler
    "distilbert": (tiny.distilbert, "DistilBert", [SEQUENCE + TOKEN]),
    "roberta": (tiny.roberta, "Roberta", [SEQUENCE + TOKEN]),
    "gpt2": (tiny.gpt2, "GPT2", [SEQUENCE + TOKEN]),
}


@dataclass(frozen=True)
class Made:
    """Experts' folders under `root`, and the twin that each is in, whole."""

    root: Path
    twins: dict[str, TwinModel]


@pytest.fixture(scope="module", params=sorted(MADE))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    make, prefix, groups = MADE[request.param]
    twins = {}
    for number, names in enumerate(groups):
        build(family(root, make(), prefix, {name: HEADS[name] for name in names}), root / f"twin{number}")
        twins |= dict.fromkeys(names, TwinModel.from_pretrained(root / f"twin{number}"))
    return Made(root, twins)


def asked(made: Made, expert: str, rows: list[Row]) -> list[Row]:
    return list(predict(made.twins[expert], rows, expert=expert))


def own(made: Made, expert: str, task: str, **settings: Any) -> Any:
    """Transformers' pipeline around the expert itself."""
    folder = str(made.root / expert)
    return pipeline(task, model=folder, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu", **settings)


def alone(made: Made, expert: str, *texts: str) -> tuple[Any, Any]:
    """The expert's own tokens and output for one row."""
    folder = made.root / expert
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    inputs = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
    with torch.inference_mode():
        model = cls.from_pretrained(folder).eval()
        known = {k: v for k, v in inputs.items() if k in inspect.signature(model.forward).parameters}
        return inputs, model(**known)


def test_classifier_gives_label_and_score(made: Made) -> None:
    found = asked(made, "spam", [{"text": text} for text in TEXTS])
    for answer, expected in zip(found, own(made, "spam", "text-classification")(TEXTS), strict=True):
        assert (answer["label"], answer["score"]) == (expected["label"], pytest.approx(expected["score"], abs=1e-5))
    assert {answer["label"] for answer in found} <= {"ham", "spam", "eggs"}


def test_one_output_or_regression_gives_values(made: Made) -> None:
    for answer, text in zip(asked(made, "stars", [{"text": text} for text in TEXTS]), TEXTS, strict=True):
        assert answer["value"] == pytest.approx(float(alone(made, "stars", text)[1].logits), abs=1e-4)
        assert "label" not in answer
    for answer, text in zip(asked(made, "axes", [{"text": text} for text in TEXTS]), TEXTS, strict=True):
        assert answer["value"] == pytest.approx(alone(made, "axes", text)[1].logits[0].tolist(), abs=1e-4)


def test_multi_label_gives_every_label_above_a_half(made: Made) -> None:
    found = asked(made, "topics", [{"text": text} for text in TEXTS])
    for answer, expected in zip(found, own(made, "topics", "text-classification", top_k=None)(TEXTS), strict=True):
        assert answer["scores"] == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-5)
        above = [one for one in expected if one["score"] > 0.5]
        assert [one["label"] for one in answer["labels"]] == [one["label"] for one in above]
        assert all(one["score"] == answer["scores"][one["label"]] for one in answer["labels"])
    assert all(0 < len(answer["labels"]) < 4 for answer in found)


def test_token_classifier_gives_entities(made: Made) -> None:
    found = asked(made, "names", [{"text": text} for text in TEXTS])
    for answer, expected in zip(found, own(made, "names", "token-classification")(TEXTS), strict=True):
        assert [(e["label"], e["word"], e["start"], e["end"]) for e in answer["entities"]] == [
            (e["entity"], e["word"], e["start"], e["end"]) for e in expected
        ]
        scores = [float(e["score"]) for e in expected]
        assert [e["score"] for e in answer["entities"]] == pytest.approx(scores, abs=1e-5)
    assert sum(len(answer["entities"]) for answer in found) > 3


def test_question_is_answered_by_a_span_of_the_second_text(made: Made) -> None:
    rows = [{"text": first, "text_pair": f"w6  {second}, w9"} for first, second in pairwise(TEXTS)]
    for row, answer in zip(rows, asked(made, "asks", rows), strict=True):
        inputs, out = alone(made, "asks", row["text"], row["text_pair"])
        best = slow_span(inputs, out.start_logits[0], out.end_logits[0])
        assert (answer["start"], answer["end"]) == best[1:]
        assert answer["score"] == pytest.approx(best[0], abs=1e-5)
        assert answer["answer"] == row["text_pair"][best[1] : best[2]]


def slow_span(inputs: Any, starts: Tensor, ends: Tensor) -> tuple[float, int, int]:
    """The best pair of a start and an end at most 15 tokens on, one by one."""
    places = [i for i, sequence in enumerate(inputs.sequence_ids()) if sequence == 1]
    start, end = (x[[0, *places]].softmax(0)[1:] for x in (starts, ends))
    pairs = [(i, j) for i in range(len(places)) for j in range(i, min(i + 15, len(places)))]
    i, j = max(pairs, key=lambda pair: float(start[pair[0]] * end[pair[1]]))
    spans = inputs.encodings[0].offsets
    return float(start[i] * end[j]), spans[places[i]][0], spans[places[j]][1]


def test_the_chosen_expert_gives_its_kind_of_answer(made: Made) -> None:
    kinds = {"spam": "label", "stars": "value", "axes": "value", "topics": "labels", "names": "entities"}
    model, found = made.twins["spam"], set()
    for text in TEXTS:
        if model(**tokenize(model, [{"text": text}])).expert != ["asks"]:
            (answer,) = predict(model, [{"text": text}])
            assert kinds[answer["expert"]] in answer
            found.add(answer["expert"])
    assert len(found) > 1
    with pytest.raises(DataError, match="row 1: the answer has a field 'value' of its own"):
        list(predict(model, [{"text": "w5", "value": 1}], expert="spam"))


def test_rows_that_a_head_cannot_read_are_refused(made: Made) -> None:
    with pytest.raises(DataError, match="row 2: to answer a question, text holds the question and text_pair where"):
        asked(made, "asks", [{"text": "w5", "text_pair": "w6"}, {"text": "w5"}])
    with pytest.raises(DataError, match="row 1: entities are looked for in one text; leave text_pair out"):
        asked(made, "names", [{"text": "w5", "text_pair": "w6"}])


@pytest.mark.parametrize(("cls", "found"), [("BertForMaskedLM", "BertForMaskedLM"), ("BertForMultipleChoice", "Bert")])
def test_heads_that_answer_no_text_are_refused_by_name(cls: str, found: str) -> None:
    with pytest.raises(MismatchError, match=rf"expert 'x' is a {found}\w*, which gives rows of text no answer"):
        answers_of({"model_type": "bert", "architectures": [cls]}, "expert 'x'")


def test_labels_are_those_of_the_config_whatever_its_keys() -> None:
    config = transformers.BertConfig(id2label={0: "a", 1: "b"})
    assert [label_of(config, i) for i in range(3)] == ["a", "b", "LABEL_2"]
    config.__dict__["id2label"] = {"0": "a", "1": "b"}
    assert [label_of(config, i) for i in range(2)] == ["a", "b"]
