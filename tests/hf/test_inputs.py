"""Rows of text as tensors: the same tokens alone and in a batch, padded where it changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from twinmerge.errors import ArtifactError
from twinmerge.hf.batches import BatchLimits
from twinmerge.hf.inputs import (
    batches_of,
    encode,
    length_limit,
    pad,
    padding_id,
    tokenize,
    tokenized_batches,
)
from twinmerge.hf.model import TwinModel
from twinmerge.hf.positions import position_table
from twinmerge.hf.router_data import EncodedRows
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
    for row, value in zip(rows(), EncodedRows.of(model, rows()).hidden(Layers("last")), strict=True):
        alone = model.features_as(Layers("last"), **tokenize(model, [row]))[0]
        assert torch.allclose(value, alone, atol=1e-5)  # padded and not


def test_ids_are_those_that_the_router_sees(model: TwinModel) -> None:
    ids = EncodedRows.of(model, rows()).ids
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
    model.max_length = 600  # no recipe makes positions
    assert length_limit(model) == tiny.POSITIONS
    model.max_length = 7
    assert tokenize(model, long)["input_ids"].shape == (1, 7)
    assert len(encode(model, long, room=3)[0]["input_ids"]) == 4
    with pytest.raises(ArtifactError, match="texts of 7 tokens leave no room for 7 new ones; ask for fewer"):
        encode(model, long, room=7)


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
SMALL = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
TABLES: dict[str, tuple[dict[str, Any], int | None]] = {
    "bert": (SIZES, 12),
    "distilbert": ({"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}, 12),
    "roberta": (SIZES | {"pad_token_id": 1}, 10),
    "xlm-roberta": (SIZES | {"pad_token_id": 3}, 8),
    "camembert": (SIZES | {"pad_token_id": 1}, 10),
    "mpnet": (SIZES | {"pad_token_id": 1}, 10),
    "ibert": (SIZES | {"pad_token_id": 1}, 10),
    "opt": (SIZES | {"ffn_dim": 8, "word_embed_proj_dim": 16}, 12),
    "bart": (SMALL | {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}, 12),
    "gpt2": ({"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}, 12),
    "deberta-v2": (SIZES | {"relative_attention": True, "position_biased_input": False}, None),
    "llama": (SIZES, None),
    "t5": ({"vocab_size": 64, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 8, "d_kv": 8}, None),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_of_positions_serves_so_many_tokens_and_no_more(name: str) -> None:
    settings, served = TABLES[name]
    config = transformers.AutoConfig.for_model(name, **settings)
    if name != "t5":
        config.max_position_embeddings = 12
    model = transformers.AutoModel.from_config(config).eval()
    reads = model.get_encoder() if config.is_encoder_decoder else model
    assert position_table(model) == served
    with torch.inference_mode():
        reads(input_ids=torch.full((1, served or 20), 9))
        if served is not None:
            with pytest.raises((IndexError, RuntimeError)):
                reads(input_ids=torch.full((1, served + 1), 9))


def test_models_are_given_what_they_take(twin: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, taken in {"bert": True, "distilbert": False, "roberta": True}.items():
        model = TwinModel.from_pretrained(twin(name))
        model.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        found = tokenize(model, rows())
        assert ("token_type_ids" in found) is taken
        model(**found)
    model.backbone.config.type_vocab_size = 1  # as published RoBERTas have: there is no second type
    assert "token_type_ids" not in tokenize(model, rows())


def test_what_cannot_be_masked_is_not_padded(twin: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    encoded = encode(model, rows())
    assert len(batches_of(model, encoded, BatchLimits())) == 1
    lengths = {len(one["input_ids"]) for one in encoded}
    forward = model.backbone.forward

    def without_mask(input_ids: Tensor, token_type_ids: Tensor | None = None) -> Any:
        return forward(input_ids=input_ids, token_type_ids=token_type_ids)

    monkeypatch.setattr(model.backbone, "forward", without_mask)
    chosen = batches_of(model, encode(model, rows()), BatchLimits(rows=2))
    assert all(len({len(encoded[i]["input_ids"]) for i in batch}) == 1 for batch in chosen)
    assert sorted(i for batch in chosen for i in batch) == list(range(8))
    assert len(chosen) >= len(lengths)


def test_padding_is_by_an_id_of_the_vocabulary(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"))
    config, tokenizer = model.backbone.config, model.tokenizer
    assert padding_id(model) == 0
    config.pad_token_id = -1  # as the first LLaMAs say
    tokenizer.pad_token = "w9"
    assert padding_id(model) == 9
    tokenizer.pad_token = None
    assert padding_id(model) == 1  # [UNK]
    tokenizer.unk_token = None
    assert padding_id(model) == 0


def test_text_without_any_limit_is_not_cut(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"))
    model.tokenizer.model_max_length = 10**30
    model.backbone.config.max_position_embeddings = -1  # as XLNet says
    assert length_limit(model) is None
    assert len(encode(model, [{"text": " ".join(["w5"] * 99)}], room=5)[0]["input_ids"]) == 99


def test_twin_without_tokenizer_takes_tensors_only(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    model.tokenizer = None
    with pytest.raises(ArtifactError, match="this twin has no tokenizer, so it takes tensors only"):
        encode(model, rows())
