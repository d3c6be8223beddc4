"""Twins whose router looks at the pass under its own guess: what they answer, and how they grow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.hf.test_model import ROWS, batch, stacked
from tests.tiny import GATE_ORDER, Family
from twinmerge.hf.model import TwinModel
from twinmerge.jobs import grow
from twinmerge.jobs.predict import predict
from twinmerge.routing.router import Stored
from twinmerge.routing.tokens import PADDING
from twinmerge.twin.artifact import TwinArtifact

Twins = Callable[..., Path]
ROUTER = {"features": "speculative", "gate": "hard", "fallback": None}
PADDED = ("w5 w6 w7 w8 w9 w10", "w5", "w11 w12 w13")
LABELS = [name for name in tiny.EXPERTS for _ in range(3)]


@pytest.fixture(params=["bert", "llama"])
def model(request: pytest.FixtureRequest, twin: Twins) -> TwinModel:
    return TwinModel.from_pretrained(twin(request.param, router=ROUTER))


def test_answers_are_those_of_the_chosen_experts(model: TwinModel) -> None:
    x = batch(*ROWS)
    out = model(**x)
    assert out.expert == LABELS
    assert torch.equal(out.gate, model.one_hot(LABELS))
    given = model(**x, expert=LABELS)
    assert torch.allclose(stacked(out.logits), stacked(given.logits), atol=1e-5)
    assert torch.equal(model.route(**x), out.gate)


def test_rows_whose_guess_was_wrong_run_again_under_the_right_expert(model: TwinModel) -> None:
    model.router.scorer.tokens.ngrams.weight.zero_()  # every guess is the same expert
    model.router.scorer.tokens.ngrams.bias.copy_(torch.tensor([0.0, 1e-3, 0.0]))
    x = batch(*ROWS)
    out = model(**x)
    assert len(set(out.expert)) > 1  # hidden states say otherwise
    given = model(**x, expert=out.expert)
    assert torch.allclose(stacked(out.logits), stacked(given.logits), atol=1e-5)


def test_the_pass_that_checks_a_guess_is_the_answer(model: TwinModel) -> None:
    """A layer sees each row once, and once more those of wrong guesses, as one batch."""
    seen: list[int] = []
    model.layers[-1].register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    x = batch(*ROWS)
    guess = model.router.scorer.tokens.score(Stored({}, x["input_ids"].masked_fill(x["attention_mask"] == 0, PADDING)))
    wrong = int((guess[0].argmax(dim=1) != torch.tensor([GATE_ORDER.index(name) for name in LABELS])).sum())
    out = model(**x)
    assert out.expert == LABELS
    assert seen == [len(ROWS), *([wrong] if wrong else [])]
    assert torch.allclose(out.probability.sum(dim=1), torch.ones(len(ROWS)))
    assert out.probability.argmax(dim=1).tolist() == out.gate.argmax(dim=1).tolist()
    seen.clear()
    model.router.scorer.tokens.ngrams.bias.add_(torch.tensor([1e4, 0.0, 0.0]))  # every guess is the first
    model.router.scorer.share.zero_()
    assert len(seen_experts := set(model(**x).expert)) > 1, seen_experts
    assert seen[0] == len(ROWS)
    assert seen[1:] == [sum(name != GATE_ORDER[0] for name in model(**x).expert)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefill_under_a_right_guess_is_gone_on_with(twin: Twins, name: str) -> None:
    model = TwinModel.from_pretrained(twin(name, router=ROUTER), dtype=torch.float64)
    longest = max(len(row.split()) for row in ROWS)
    rows = [row for row in ROWS if name == "llama" or len(row.split()) == longest]  # GPT-2 would count padding
    x, settings = batch(*rows, side="left"), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    seen: list[tuple[int, int]] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    model.layers[-1].register_forward_pre_hook(watch, with_kwargs=True)
    for misled in (False, True):
        if misled:  # every guess is the first expert
            model.router.scorer.tokens.ngrams.bias.add_(torch.tensor([1e4, 0.0, 0.0]))
            model.router.scorer.share.zero_()
        names = model(**x).expert
        expected = model.generate(**x, expert=names, **settings)
        seen.clear()
        assert torch.equal(model.generate(**x, **settings), expected)
        passes = [shape for shape in seen if shape[1] > 1]
        wrong = sum(name != GATE_ORDER[0] for name in names) if misled else 0
        assert passes == [(len(rows), x["input_ids"].shape[1]), *([(wrong, x["input_ids"].shape[1])] if wrong else [])]
    assert wrong


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_of_different_lengths_are_written_on_as_transformers_would(twin: Twins, name: str) -> None:
    model = TwinModel.from_pretrained(twin(name, router=ROUTER), dtype=torch.float64)
    x, settings = batch(*PADDED, side="left"), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert not x["attention_mask"].all()
    written, routing = model.generate_routed(**x, **settings)
    names = [GATE_ORDER[index] for index in routing.expert.tolist()]
    assert torch.equal(written, model.generate(**x, expert=names, **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}], ids=str
)
def test_an_experts_own_settings_that_need_another_pass_get_one(
    twin: Twins, name: str, settings: dict[str, Any]
) -> None:
    model = TwinModel.from_pretrained(twin(name, router=ROUTER), dtype=torch.float64)
    model.backbone.generation_config.update(**settings)
    x, asked = batch(*ROWS[:2], side="left"), {"max_new_tokens": 3, "pad_token_id": 0}
    names = model(**x).expert
    torch.manual_seed(0)
    found = model.generate(**x, **asked)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(**x, expert=names, **asked))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_predict_writes_on_from_the_pass_that_routes(twin: Twins, name: str) -> None:
    """No pass over whole prompts beside the prefill, and the answers of a router that is asked before."""
    model = TwinModel.from_pretrained(twin(name, router=ROUTER), dtype=torch.float64)
    rows, seen = [{"text": text} for text in ROWS], list[tuple[int, int]]()

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    model.layers[-1].register_forward_pre_hook(watch, with_kwargs=True)
    found = list(predict(model, rows, max_new_tokens=3))
    prompts = sum(batch for batch, tokens in seen if tokens > 1)
    assert prompts < 1.5 * len(rows), seen  # each once, and again those of wrong guesses
    for answer, row in zip(found, rows, strict=True):
        (alone,) = predict(model, [row], max_new_tokens=3, expert=answer["expert"])
        assert answer["continuation"] == alone["continuation"]
        assert answer["confidence"] >= answer["second"]["probability"]


def test_rows_unlike_all_others_are_the_shared_experts(model: TwinModel) -> None:
    model.router.fallback_distance.fill_(-float("inf"))
    x = batch(*ROWS)
    out = model(**x)
    assert out.fallback.all()
    assert not out.gate.any()
    given = model(**x, gate=torch.zeros(len(ROWS), 3), expert=out.expert)
    assert torch.allclose(stacked(out.logits), stacked(given.logits), atol=1e-5)


def test_row_does_not_depend_on_its_batch_mates(model: TwinModel) -> None:
    model.router.scorer.tokens.ngrams.weight.mul_(0.01)  # guesses are wrong at times
    together = model(**batch(*ROWS))
    for row, text in enumerate(ROWS):
        alone = model(**batch(text))
        assert alone.expert == together.expert[row : row + 1]
        found, expected = stacked(together.logits)[row], stacked(alone.logits)[0]
        if not model.heads:
            found = found[: len(expected)]
        assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-5)


def test_twin_that_grows_and_shrinks_checks_its_guesses_anew(
    family: Callable[[str], Family], twin: Twins, tmp_path: Path
) -> None:
    old, root = twin("bert", router=ROUTER), family("bert").root
    new: dict[str, Any] = {"model": root / "sms", "router_data": root / "far.jsonl"}
    new["router_data"].write_text("".join(f'{{"text": "w{5 + i % 9} w60 w{59 + i % 3}"}}\n' for i in range(24)))
    grown = grow.add(old, "far", **new, out=tmp_path / "grown")
    assert grown.expert_names == ("ag", "far", "sms", "trec")
    model = TwinModel.from_pretrained(tmp_path / "grown")
    assert model(**batch("w6 w60 w60", *ROWS)).expert == ["far", *LABELS]
    report = TwinArtifact.open(tmp_path / "grown").manifest.router.content()
    assert report["inputs"] == dict.fromkeys(("ag", "far", "sms", "trec"), 24)
    assert 0 <= report["second_look"] <= 1
    grow.remove(tmp_path / "grown", "far")
    again = TwinModel.from_pretrained(tmp_path / "grown")
    before = TwinModel.from_pretrained(old)
    x = batch(*ROWS)
    assert again.expert_names == GATE_ORDER
    assert torch.equal(again(**x).gate, before(**x).gate)
