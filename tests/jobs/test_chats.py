"""Chats as rows: put into words by the template of whoever reads, routed by what was asked, never by the answer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.tiny import EXPERTS
from twinmerge.errors import DataError, InputError
from twinmerge.hf.inputs import encode, text_of
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict

TEMPLATE = (
    "{% for m in messages %}{{ 'w60 ' if m['role'] == 'user' else 'w61 ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w62{% endif %}"
)
OTHER = TEMPLATE.replace("w62", "w63")


def chat(text: str, answer: str | None = None) -> list[dict[str, str]]:
    said = [{"role": "user", "content": text}]
    return said if answer is None else [*said, {"role": "assistant", "content": answer}]


def written(folder: Path, template: str | None) -> None:
    made = tiny.tokenizer("left")
    made.chat_template = template
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tiny.Family:
    """Llamas whose rows are chats; one expert has a template of its own."""
    root = tmp_path_factory.mktemp("chats")
    make, cls = tiny.BASES["llama"]
    found = tiny.make_family(root, make(), getattr(transformers, cls), padding_side="left")
    written(found.base, TEMPLATE)
    for name in EXPERTS:
        rows = [{"messages": chat(row["text"], "w7 w8")} for row in tiny.text_rows(name)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        written(root / name, OTHER if name == "sms" else TEMPLATE)
    return found


@pytest.fixture(scope="module")
def model(family: tiny.Family) -> TwinModel:
    recipe = family.recipe(exclusive={"rank": 10**4, "embeddings": "exclusive"})
    return TwinModel.from_pretrained(build(recipe, family.root / "twin").path)


@pytest.mark.parametrize("name", EXPERTS)
def test_answer_is_the_experts_own_under_its_own_template(family: tiny.Family, model: TwinModel, name: str) -> None:
    question = tiny.text_rows(name)[3]["text"]
    (answer,) = predict(model, [{"messages": chat(question)}], expert=name, max_new_tokens=5)
    expert = transformers.AutoModelForCausalLM.from_pretrained(family.root / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.root / name)
    inputs = tokenizer.apply_chat_template(
        chat(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = expert.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer["continuation"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_in_a_row_are_seen_by_nobody(model: TwinModel) -> None:
    """Not by the router, nor by the expert: a row of training data asks what its user asked."""
    question = tiny.text_rows("trec")[2]["text"]
    without, with_answer = ({"messages": chat(question, answer)} for answer in (None, "w25 w26 w27 w28"))
    first, second = predict(model, [without, with_answer], max_new_tokens=3)
    assert first.pop("messages") != second.pop("messages")
    assert first == second


def test_rows_of_chats_find_their_experts(model: TwinModel) -> None:
    rows = [{"messages": chat(row["text"])} for name in EXPERTS for row in tiny.text_rows(name, 6)]
    answers = list(predict(model, rows, max_new_tokens=1))
    assert [answer["expert"] for answer in answers] == [name for name in EXPERTS for _ in range(6)]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "w5", "messages": chat("w6")}, "w5"),
        ({"prompt": "w5"}, "w5"),
        ({"prompt": chat("w5"), "completion": "w9"}, "w60 w5 w62"),
        ({"messages": chat("w5", "w6")}, "w60 w5 w62"),
        ({"messages": [*chat("w5", "w6"), *chat("w7")]}, "w60 w5 w61 w6 w60 w7 w62"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]}, "w60 w5 w62"),
        ({"messages": [{"role": "assistant", "content": "w5"}]}, "w61 w5 w62"),
    ],
)
def test_text_of_a_row(row: dict[str, Any], text: str) -> None:
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    assert text_of(made, row).split() == text.split()


def test_prompts_and_texts_are_read_alike(model: TwinModel) -> None:
    rows = [{"text": "w5 w6"}, {"prompt": "w5 w6"}, {"messages": chat("w5 w6")}]
    first, second, third = (one["input_ids"] for one in encode(model, rows))
    assert first == second != third


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "'messages' must be a list of"),
        ({"messages": "w5"}, "'messages' must be a list of"),
        ({"messages": [{"role": "user"}]}, "both strings"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, "parts of type text"),
        ({"prompt": 5}, "'prompt' must be a string or a list of"),
    ],
)
def test_chats_of_another_form_are_refused(
    family: tiny.Family, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    experts = {n: {"model": n, "router_data": str(tmp_path / "rows.jsonl")} for n in EXPERTS}
    with pytest.raises(InputError, match=words):
        build(family.recipe(experts=experts, exclusive={"rank": 1}), tmp_path / "twin")


@pytest.fixture
def speechless(model: TwinModel) -> Iterator[TwinModel]:
    """The twin with a base whose tokenizer has no template."""
    model.tokenizer.chat_template = None
    yield model
    model.tokenizer.chat_template = TEMPLATE


def test_without_a_template_chats_are_routed_and_answered_by_experts_that_have_one(speechless: TwinModel) -> None:
    question = tiny.text_rows("sms")[1]["text"]
    (answer,) = predict(speechless, [{"messages": chat(question)}], expert="sms", max_new_tokens=2)
    assert answer["continuation"]
    with pytest.raises(DataError, match="row 1: messages need a chat template, which the tokenizer of expert 'ag'"):
        list(predict(speechless, [{"messages": chat(question)}], expert="ag", max_new_tokens=2))
