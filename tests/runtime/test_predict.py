"""Rows in, answers out: in input order, whatever the batches; other fields are handed through."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.tiny import EXPERTS, GATE_ORDER, LABELS
from twinmerge.errors import ArtifactError, GateError
from twinmerge.runtime import predict as module
from twinmerge.runtime.model import TwinModel
from twinmerge.runtime.predict import batches, features_of, length_limit, predict, tokenize

Twins = Callable[..., Path]
Row = dict[str, Any]


def rows() -> list[Row]:
    """Rows of all experts mixed, some with a second text."""
    mixed = [row for group in zip(*(tiny.text_rows(name, 6) for name in EXPERTS), strict=True) for row in group]
    for index, row in enumerate(mixed):
        row["id"] = index  # type: ignore[assignment]
        if index % 5 == 0:
            row["text_pair"] = mixed[(index + 7) % len(mixed)]["text"]
    return mixed


@pytest.fixture(scope="module")
def model(twin: Twins) -> TwinModel:
    return TwinModel.from_pretrained(twin("bert"))


def close(first: Row, second: Row) -> bool:
    """The same answer to what is rounded away."""
    return (
        first["expert"] == second["expert"]
        and first["label"] == second["label"]
        and first["score"] == pytest.approx(second["score"], abs=1e-5)
        and first["gate"] == pytest.approx(second["gate"], abs=1e-4)
    )


def test_answers_come_in_input_order_with_the_inputs_other_fields(model: TwinModel) -> None:
    answers = list(predict(model, rows()))
    assert [answer["id"] for answer in answers] == list(range(18))
    for answer, row in zip(answers, rows(), strict=True):
        assert list(answer)[:5] == ["expert", "gate", "fallback", "label", "score"]
        assert {key: answer[key] for key in row} == row
        assert list(answer["gate"]) == list(GATE_ORDER)
        assert sum(answer["gate"].values()) == pytest.approx(0.0 if answer["fallback"] else 1.0, abs=1e-5)
        assert answer["label"] in {f"LABEL_{i}" for i in range(LABELS[answer["expert"]])}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_change_no_answer(model: TwinModel, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(predict(model, rows()))
    monkeypatch.setattr(module, "WINDOW_BATCHES", 2)  # several windows
    found = list(predict(model, rows(), batch_size=batch_size))
    assert all(close(first, second) for first, second in zip(found, expected, strict=True))


def test_answer_is_what_the_model_says_of_the_row(model: TwinModel) -> None:
    row = rows()[0]
    (answer,) = predict(model, [row])
    out = model(**model.tokenizer(row["text"], row["text_pair"], return_tensors="pt"))
    probabilities = out.logits[0].softmax(dim=0)
    assert answer["expert"] == out.expert[0]
    assert answer["score"] == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert answer["label"] == model.heads[out.expert[0]].config.id2label[int(probabilities.argmax())]


def test_one_expert_can_be_asked_alone(model: TwinModel) -> None:
    for answer in predict(model, rows(), expert="sms"):
        assert (answer["expert"], answer["fallback"]) == ("sms", False)
        assert answer["gate"] == {"ag": 0.0, "sms": 1.0, "trec": 0.0}
    with pytest.raises(GateError, match="unknown expert 'smss'; this twin has ag, sms, trec"):
        list(predict(model, rows(), expert="smss"))


def test_field_of_the_input_does_not_hide_an_answer(model: TwinModel) -> None:
    (answer,) = predict(model, [{"text": "w5 w6", "label": "gold", "expert": "nobody"}])
    assert answer["label"] != "gold"
    assert answer["expert"] in EXPERTS


def test_inputs_unlike_any_expert_say_so(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    model.router.fallback_distance.zero_()
    (answer,) = predict(model, [{"text": "w5 w6"}])
    assert answer["fallback"] is True
    assert set(answer["gate"].values()) == {0.0}


def test_rows_are_taken_as_they_come(model: TwinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_BATCHES", 1)
    taken: list[int] = []

    def endless() -> Iterator[Row]:
        for index in range(10**9):
            taken.append(index)
            yield {"text": "w5"}

    stream = predict(model, endless(), batch_size=4)
    for _ in range(5):
        next(stream)
    assert len(taken) == 8


def test_no_rows_give_no_answers(model: TwinModel) -> None:
    assert list(predict(model, [])) == []


def test_twin_without_heads_gives_expert_and_gate_only(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"))
    (answer,) = predict(model, [{"text": "w5 w6"}])
    assert list(answer) == ["expert", "gate", "fallback", "text"]


# ---- batches and tokens


@given(
    st.lists(st.fixed_dictionaries({"text": st.text(max_size=9)}, optional={"text_pair": st.text(max_size=9)})),
    st.integers(1, 5),
)
def test_batches_hold_every_row_once_and_never_mix_pairs_with_single_texts(some: list[Row], batch_size: int) -> None:
    found = batches(some, batch_size)
    assert sorted(index for part in found for index in part) == list(range(len(some)))
    for part in found:
        assert 1 <= len(part) <= batch_size
        assert len({"text_pair" in some[index] for index in part}) == 1
        lengths = [len(some[index]["text"]) + len(some[index].get("text_pair", "")) for index in part]
        assert lengths == sorted(lengths, reverse=True)


def test_features_of_rows_are_those_of_each_alone(model: TwinModel) -> None:
    some = rows()
    for chosen, values in features_of(model, some, "last", batch_size=4):
        for index, value in zip(chosen, values, strict=True):
            alone = model.features_as("last", **tokenize(model, [some[index]]))[0]
            assert torch.allclose(value, alone, atol=1e-5)  # padded and not


def test_inputs_are_cut_at_the_smallest_limit(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    long = [{"text": " ".join(["w5"] * 99)}]
    assert tokenize(model, long)["input_ids"].shape == (1, tiny.POSITIONS)
    model.tokenizer.model_max_length = 10**30  # what tokenizers without a limit say
    assert length_limit(model) == tiny.POSITIONS
    model.max_length = 7
    assert tokenize(model, long)["input_ids"].shape == (1, 7)


def test_twin_without_tokenizer_takes_tensors_only(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    model.tokenizer = None
    with pytest.raises(ArtifactError, match="this twin has no tokenizer, so it takes tensors only"):
        list(predict(model, rows()))
