"""How texts are written: by beams, by sampling, and what ends them; each row as its expert alone would write it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.tiny import EXPERTS
from twinmerge.cli import main
from twinmerge.errors import InputError
from twinmerge.hf.batches import BatchLimits, PredictSettings, Writing
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict, predict_file


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tiny.Family:
    make, cls = tiny.BASES["llama"]
    root = tmp_path_factory.mktemp("writing")
    return tiny.make_family(root, make(), getattr(transformers, cls), padding_side="left")


@pytest.fixture(scope="module")
def twin(family: tiny.Family) -> Path:
    recipe = family.recipe(exclusive={"rank": 10**4, "embeddings": "exclusive"})
    return build(recipe, family.root / "twin").path


@pytest.fixture(scope="module")
def model(twin: Path) -> TwinModel:
    return TwinModel.from_pretrained(twin)


def rows_of(expert: str, count: int = 6) -> list[dict[str, str]]:
    return [{"text": row["text"]} for row in tiny.text_rows(expert)[:count]]


def own_text(family: tiny.Family, expert: str, text: str, **asked: Any) -> str:
    cls = getattr(transformers, tiny.BASES["llama"][1])
    theirs = cls.from_pretrained(family.root / expert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        written = theirs.generate(**inputs, max_new_tokens=8, tokenizer=tokenizer, pad_token_id=0, **asked)
    found: str = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def texts(answers: Iterator[dict[str, Any]]) -> list[str]:
    return [answer["continuation"] for answer in answers]


@pytest.mark.parametrize("name", EXPERTS)
def test_beams_are_the_experts_own_in_any_batch(family: tiny.Family, model: TwinModel, name: str) -> None:
    rows = rows_of(name)
    found = texts(predict(model, rows, expert=name, max_new_tokens=8, writing=Writing(num_beams=3)))
    assert found == [own_text(family, name, row["text"], num_beams=3, do_sample=False) for row in rows]
    assert found != texts(predict(model, rows, expert=name, max_new_tokens=8))


def test_routed_beams_are_those_of_the_expert_that_answers(model: TwinModel) -> None:
    rows = [row for name in EXPERTS for row in rows_of(name, 3)]
    routed = list(predict(model, rows, max_new_tokens=6, writing=Writing(num_beams=2)))
    for row, answer in zip(rows, routed, strict=True):
        if not answer["fallback"]:
            alone = predict(model, [row], gate=answer["gate"], max_new_tokens=6, writing=Writing(num_beams=2))
            assert texts(alone) == [answer["continuation"]]


def test_what_is_drawn_depends_on_the_seed_and_leaves_the_callers_random_numbers(model: TwinModel) -> None:
    rows = rows_of(EXPERTS[0], 12)
    before = torch.random.get_rng_state()
    first, again, other = (
        texts(predict(model, rows, max_new_tokens=8, writing=Writing(temperature=1.5, seed=seed))) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert len(set(first)) > 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_token_to_draw_from_is_the_greedy_text(model: TwinModel) -> None:
    rows = rows_of(EXPERTS[0])
    greedy = texts(predict(model, rows, max_new_tokens=8))
    for writing in (Writing(top_k=1), Writing(top_p=1e-6), Writing(temperature=0), Writing(temperature=1e-4)):
        assert texts(predict(model, rows, max_new_tokens=8, writing=writing)) == greedy


@pytest.fixture(scope="module")
def speller(family: tiny.Family) -> TwinModel:
    """The same twin, spelling its texts."""
    shutil.copytree(family.base, family.root / "spelling")
    tiny.by_letters().save_pretrained(family.root / "spelling")
    recipe = family.recipe(
        base="spelling", exclusive={"rank": 10**4, "embeddings": "exclusive"}, router={"features": "tokens"}
    )
    return TwinModel.from_pretrained(build(recipe, family.root / "speller").path)


def test_a_text_ends_before_what_stops_it(speller: TwinModel) -> None:
    rows, name = rows_of(EXPERTS[0]), EXPERTS[0]
    whole = texts(predict(speller, rows, expert=name, max_new_tokens=8))
    stop = next(text[2:4] for text in whole if len(text) > 5)
    stopped = predict(speller, rows, expert=name, max_new_tokens=8, writing=Writing(stop=(stop, "nowhere")))
    for text, answer in zip(whole, stopped, strict=True):
        assert answer["continuation"] == text.split(stop)[0]
        assert stop not in text or answer["stop_reason"] == "stop"


def test_an_experts_own_stop_strings_hold_beside_those_asked_for(speller: TwinModel) -> None:
    rows, name = rows_of(EXPERTS[0]), EXPERTS[0]
    whole = texts(predict(speller, rows, expert=name, max_new_tokens=8))
    row, text = next((row, text) for row, text in zip(rows, whole, strict=True) if len(set(text)) > 3)
    settings = speller.backbone.generation_config
    settings.stop_strings = [text[2]]
    try:
        found = next(predict(speller, [row], expert=name, max_new_tokens=8, writing=Writing(stop=("nowhere",))))
    finally:
        settings.stop_strings = None
    assert found["continuation"] == text[: text.index(text[2]) + 1]
    assert found["stop_reason"] == "stop"


def test_stop_strings_in_tokens_without_a_text_are_refused(model: TwinModel) -> None:
    with pytest.raises(InputError, match="stop strings need a tokenizer whose tokens have a text of their own"):
        next(predict(model, rows_of(EXPERTS[0]), writing=Writing(stop=("w5",))))


def test_an_interrupted_run_that_draws_goes_on_with_the_same_texts(
    twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinmerge.jobs.predict.WINDOW_ROWS", 4)
    rows = rows_of(EXPERTS[0], 12)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PredictSettings(limits=BatchLimits(rows=2), max_new_tokens=4, writing=Writing(temperature=2.0))
    predict_file(twin, source, tmp_path / "whole.jsonl", settings)

    def stop(done: int, total: int | None) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_file(twin, source, tmp_path / "again.jsonl", settings, progress=stop)
    assert predict_file(twin, source, tmp_path / "again.jsonl", settings, resume=True)["resumed"] >= 4
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], "temperature must be a finite number, 0 or more, found -1.0"),
        (["--temperature", "nan"], "temperature must be a finite number"),
        (["--top-p", "0"], "top_p must be above 0, at most 1, found 0.0"),
        (["--top-k", "0"], "must be a whole number, 1 or more, found '0'"),
        (["--num-beams", "0"], "must be a whole number, 1 or more, found '0'"),
        (["--stop", ""], "stop must be strings of at least one character"),
    ],
)
def test_settings_that_say_nothing_are_refused_before_any_work(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "w1"}\n')
    command = ["predict", str(twin), "--input", str(source), "--output", str(target), *options]
    try:
        code = main(command)
    except SystemExit as ended:  # of what argparse refuses
        code = ended.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not target.exists()


def test_the_command_writes_as_python_does(twin: Path, model: TwinModel, tmp_path: Path) -> None:
    rows, target = rows_of(EXPERTS[1]), tmp_path / "out.jsonl"
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--num-beams", "2", "--top-k", "4", "--seed", "7", "--max-new-tokens", "6"]
    assert main(["predict", str(twin), "--input", str(source), "--output", str(target), *options]) == 0
    writing = Writing(num_beams=2, top_k=4, seed=7)
    found = [json.loads(line)["continuation"] for line in target.read_text().splitlines()]
    assert found == texts(predict(model, rows, max_new_tokens=6, writing=writing))


def test_experts_that_write_nothing_are_refused(tmp_path: Path) -> None:
    made = tiny.make_family(tmp_path, tiny.BASES["bert"][0](), transformers.BertForSequenceClassification)
    found = build(made.recipe(exclusive={"rank": 2}), tmp_path / "twin").path
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(InputError, match="experts that write texts; those of this twin answer with label"):
        predict_file(
            found, tmp_path / "rows.jsonl", tmp_path / "o.jsonl", PredictSettings(writing=Writing(num_beams=2))
        )
