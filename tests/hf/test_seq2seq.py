"""Models of an encoder and a decoder: routed by the encoder, each row as its expert alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests import tiny
from twinmerge.errors import MismatchError
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict
from twinmerge.models.compatible import Allow

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


ROWS = [row for name in tiny.EXPERTS for row in tiny.text_rows(name, 3)]
EXPERTS = [name for name in tiny.EXPERTS for _ in range(3)]
SPECIAL = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}


def t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, initializer_factor=4.0, **SPECIAL,
    )  # fmt: skip
    return tiny.seeded(transformers.T5ForConditionalGeneration, config)


def bart() -> PreTrainedModel:
    config = transformers.BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=tiny.POSITIONS,
        init_std=0.5, forced_eos_token_id=None, bos_token_id=2, **SPECIAL,
    )  # fmt: skip
    return tiny.seeded(transformers.BartForConditionalGeneration, config)


@pytest.fixture(scope="module", params=[t5, bart])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.Family, Path]:
    root, base = tmp_path_factory.mktemp("family"), request.param()
    made = tiny.make_family(root / "family", base, type(base), scale=0.2)
    recipe = made.recipe(exclusive={"rank": 64, "embeddings": "exclusive"}, router={"features": "all", "gate": "hard"})
    return made, build(recipe, root / "twin").path


def test_the_encoder_routes(built: tuple[tiny.Family, Path]) -> None:
    model = TwinModel.from_pretrained(built[1])
    x = model.tokenizer([row["text"] for row in ROWS], return_tensors="pt", padding=True)
    states = model.backbone.get_encoder()(**x, output_hidden_states=True).hidden_states
    mask = x["attention_mask"][..., None]
    wanted = torch.cat([(state * mask).sum(dim=1) / mask.sum(dim=1) for state in states], dim=1)
    assert torch.allclose(model.features(**x), wanted, atol=1e-5)
    assert model(**x, decoder_input_ids=torch.zeros(len(ROWS), 1, dtype=torch.long)).expert == EXPERTS


def test_loss_is_that_of_each_rows_merged_model(built: tuple[tiny.Family, Path]) -> None:
    model = TwinModel.from_pretrained(built[1], dtype=torch.float64)
    ids = torch.tensor([[6, 7, 8], [30, 31, 32], [50, 51, 52]])
    labels, gate = ids.roll(1, dims=1), tiny.random_gate(3, dtype=torch.float64)
    alone = [model.materialize(gate[i])(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss for i in range(3)]
    assert torch.allclose(model(ids, gate=gate, labels=labels).loss, torch.stack(alone).mean())


def test_texts_are_those_of_the_experts(built: tuple[tiny.Family, Path]) -> None:
    family, folder = built
    answers = list(predict(TwinModel.from_pretrained(folder), ROWS, max_new_tokens=6))
    assert [answer["expert"] for answer in answers] == EXPERTS
    tokenizer: Any = tiny.tokenizer()
    for row, answer in zip(ROWS, answers, strict=True):
        expert = transformers.AutoModelForSeq2SeqLM.from_pretrained(family.root / answer["expert"]).eval()
        x = tokenizer([row["text"]], return_tensors="pt")
        written = expert.generate(**x, max_new_tokens=6, do_sample=False)[0, 1:]
        assert answer["continuation"] == tokenizer.decode(written, skip_special_tokens=True)
        assert answer["stop_reason"] == ("stop" if 3 in written.tolist() else "length")
    assert len({answer["continuation"] for answer in answers}) > 3


def test_prompts_are_not_padded_where_positions_would_count_it(tmp_path: Path) -> None:
    """BART's decoder alone takes no positions: they count from the first column."""
    settings = {"is_decoder": True, "is_encoder_decoder": False, "decoder_layers": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=16, decoder_ffn_dim=32, max_position_embeddings=tiny.POSITIONS,
        init_std=0.5, forced_eos_token_id=None, bos_token_id=2, **settings, **SPECIAL,
    )  # fmt: skip
    made = tiny.make_family(
        tmp_path / "family",
        tiny.seeded(transformers.BartForCausalLM, config),
        transformers.BartForCausalLM,
        scale=0.2,
        padding_side="left",
    )
    whole = {"exclusive": {"rank": 64, "embeddings": "exclusive"}}
    twin = build(made.recipe(**whole, router={"features": "tokens", "gate": "hard"}), tmp_path / "twin")
    for row, answer in zip(ROWS, predict(TwinModel.from_pretrained(twin.path), ROWS, max_new_tokens=5), strict=True):
        expert = transformers.BartForCausalLM.from_pretrained(made.root / answer["expert"]).eval()
        x = tiny.tokenizer()([row["text"]], return_tensors="pt")
        written = expert.generate(**x, max_new_tokens=5, do_sample=False)[0, x["input_ids"].shape[1] :]
        assert answer["continuation"] == tiny.tokenizer().decode(written, skip_special_tokens=True)


def longformer() -> transformers.LongformerConfig:
    return tiny.text_config(transformers.LongformerConfig, attention_window=[4, 4], pad_token_id=0, sep_token_id=3)


def test_what_a_class_adds_for_its_backbone_is_added(tmp_path: Path) -> None:
    """Longformer's classifiers let the first token see all others; other classes of its do otherwise."""
    base = tiny.seeded(transformers.LongformerModel, longformer())
    made = tiny.make_family(tmp_path / "family", base, transformers.LongformerForSequenceClassification, scale=0.2)
    settings = {"exclusive": {"rank": 64, "embeddings": "exclusive"}}
    twin = build(made.recipe(**settings, router={"features": "tokens", "gate": "hard"}), tmp_path / "twin")
    for row, answer in zip(ROWS, predict(TwinModel.from_pretrained(twin.path), ROWS), strict=True):
        expert = transformers.LongformerForSequenceClassification.from_pretrained(made.root / answer["expert"]).eval()
        with torch.inference_mode():
            logits = expert(**tiny.tokenizer()([row["text"]], return_tensors="pt")).logits[0]
        assert answer["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
    config = transformers.LongformerConfig.from_pretrained(made.base, num_labels=3)
    tiny.seeded(transformers.LongformerForTokenClassification, config).save_pretrained(made.root / "sms")
    words = (
        "LongformerForSequenceClassification, which gives its backbone global_attention_mask, expert 'sms' is a Long"
    )
    with pytest.raises(MismatchError, match=words):
        build(made.recipe(**settings), tmp_path / "mixed", allow=Allow(unrelated=True))


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_classifiers_on_an_encoder_and_a_decoder_answer_as_themselves(tmp_path: Path, name: str) -> None:
    """T5 gives its decoder the input once more; Bart's does so itself."""
    backbone, classifier = (getattr(transformers, f"{name}{kind}") for kind in ("Model", "ForSequenceClassification"))
    base = tiny.seeded(backbone, (t5 if name == "T5" else bart)().config)
    made = tiny.make_family(
        tmp_path / "family", base, classifier, rows=with_end, experts=("sms", "ag"), scale=0.2
    )  # of two labels, its config.json says nothing, which transformers takes for three
    twin = build(
        made.recipe(exclusive={"rank": 64, "embeddings": "exclusive"}, router={"features": "tokens", "gate": "hard"}),
        tmp_path / "twin",
    )
    model = TwinModel.from_pretrained(twin.path)
    rows = [row for name in made.experts for row in with_end(name)[:3]]
    read: Callable[..., Any] = tiny.tokenizer()
    for row, answer in zip(rows, predict(model, rows), strict=True):
        expert = classifier.from_pretrained(made.root / answer["expert"]).eval()
        with torch.inference_mode():
            logits = expert(**read([row["text"]], return_tensors="pt")).logits[0]
        assert answer["label"] == f"LABEL_{int(logits.argmax())}"
        assert answer["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)


def with_end(name: str) -> list[dict[str, str]]:
    """These classifiers read at the end token."""
    return [{"text": row["text"] + " [SEP]"} for row in tiny.text_rows(name)]
