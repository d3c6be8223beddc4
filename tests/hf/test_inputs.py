"""Rows of text as tensors: the same tokens alone and in a batch, padded where it changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from twinmerge.errors import ArtifactError
from twinmerge.hf.batches import BatchLimits
from twinmerge.hf.inputs import encode, features_of, ids_of, length_limit, pad, tokenize, tokenized_batches
from twinmerge.hf.model import TwinModel
from twinmerge.routing.tokens import PADDING, token_ids
from twinmerge.twin.features import Layers

Twins = Callable[..., Path]


def rows() -> list[dict[str, Any]]:
    """Different lengths, some with a second text."""
    some: list[dict[str, Any]] = [dict(row) for row in tiny.text_rows("trec", 8)]
    for index in (1, 4):
        some[index]["text_pair"] = some[index + 1]["text"]
    return some


@pytest.fixture(scope="module")
def model(twin: Twins) -> TwinModel:
    return TwinModel.from_pretrained(twin("bert"))


def test_rows_with_and_without_a_second_text_share_a_batch(model: TwinModel) -> None:
    (batch,) = tokenized_batches(model, rows())
    chosen, inputs = batch
    assert sorted(chosen) == list(range(8))
    for place, index in enumerate(chosen):
        row = rows()[index]
        alone = model.tokenizer(row["text"], row.get("text_pair"), return_tensors="pt")
        count = alone["input_ids"].shape[1]
        for name, values in alone.items():
            assert inputs[name][place, :count].tolist() == values[0].tolist()
        assert inputs["input_ids"][place, count:].eq(model.tokenizer.pad_token_id).all()
        assert inputs["attention_mask"][place, count:].eq(0).all()


def test_padding_goes_where_it_is_asked_for(model: TwinModel) -> None:
    encoded = encode(model, [{"text": "w5"}, {"text": "w5 w6 w7"}])
    assert pad(model, encoded)["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert pad(model, encoded, side="left")["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_features_of_rows_are_those_of_each_alone(twin: Twins, name: str) -> None:
    """GPT-2 counts positions, and its tokenizer pads on the left: positions must start at the first real token."""
    model = TwinModel.from_pretrained(twin(name))
    for chosen, values in features_of(model, rows(), Layers("last"), BatchLimits(rows=4)):
        for index, value in zip(chosen, values, strict=True):
            alone = model.features_as(Layers("last"), **tokenize(model, [rows()[index]]))[0]
            assert torch.allclose(value, alone, atol=1e-5)  # padded and not


def test_ids_are_those_that_the_router_sees(model: TwinModel) -> None:
    ids = ids_of(model, rows())
    for row, found in zip(rows(), ids, strict=True):
        assert found[found != PADDING].tolist() == token_ids(tokenize(model, [row]))[0].tolist()


@pytest.mark.parametrize(("name", "first"), [("bert", 3), ("gpt2", 3)])  # neither has a token that begins: [SEP] ends
def test_row_without_tokens_is_one_token(twin: Twins, name: str, first: int) -> None:
    model = TwinModel.from_pretrained(twin(name))
    assert encode(model, [{"text": ""}])[0]["input_ids"] == [first]
    assert tokenize(model, [{"text": ""}])["attention_mask"].tolist() == [[1]]


def test_inputs_are_cut_at_the_smallest_limit(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    long = [{"text": " ".join(["w5"] * 99)}]
    assert tokenize(model, long)["input_ids"].shape == (1, tiny.POSITIONS)
    model.tokenizer.model_max_length = 10**30  # what tokenizers without a limit say
    assert length_limit(model) == tiny.POSITIONS
    model.max_length = 7
    assert tokenize(model, long)["input_ids"].shape == (1, 7)
    assert len(encode(model, long, room=3)[0]["input_ids"]) == 4
    with pytest.raises(ArtifactError, match="texts of 7 tokens leave no room for 7 new ones; ask for fewer"):
        encode(model, long, room=7)


def test_twin_without_tokenizer_takes_tensors_only(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    model.tokenizer = None
    with pytest.raises(ArtifactError, match="this twin has no tokenizer, so it takes tensors only"):
        encode(model, rows())
