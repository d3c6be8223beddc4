"""Rows in, answers out: in input order, whatever the batches; other fields are handed through."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.jobs import kill_predict
from tests.tiny import EXPERTS, GATE_ORDER, LABELS
from twinmerge.errors import DataError, GateError, InputError, OutputExistsError
from twinmerge.files.target import GrowingFile
from twinmerge.hf.batches import BatchLimits, PredictSettings
from twinmerge.hf.model import TwinModel
from twinmerge.jobs import predict as module
from twinmerge.jobs.predict import predict, predict_file

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
        assert list(answer)[:7] == ["expert", "gate", "fallback", "confidence", "second", "label", "score"]
        assert answer["second"]["expert"] in {*GATE_ORDER} - {answer["expert"]}
        assert 0.5 >= answer["second"]["probability"] <= answer["confidence"] <= 1
        assert {key: answer[key] for key in row} == row
        assert list(answer["gate"]) == list(GATE_ORDER)
        assert sum(answer["gate"].values()) == pytest.approx(0.0 if answer["fallback"] else 1.0, abs=1e-5)
        assert answer["label"] in {f"LABEL_{i}" for i in range(LABELS[answer["expert"]])}


@pytest.mark.parametrize("limits", [BatchLimits(1), BatchLimits(4), BatchLimits(100, 12), BatchLimits(100, 10**6)])
@pytest.mark.parametrize("expert", [None, "ag"])
def test_batches_and_windows_change_no_answer(
    model: TwinModel, limits: BatchLimits, expert: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [answer for row in rows() for answer in predict(model, [row], expert=expert)]
    monkeypatch.setattr(module, "WINDOW_ROWS", 7)
    found = list(predict(model, rows(), limits=limits, expert=expert))
    assert all(close(first, second) for first, second in zip(found, alone, strict=True))


def test_what_was_asked_before_changes_no_bit(twin: Twins) -> None:
    """Nor does where a run was taken up: neither learnt layouts nor merged weights may enter."""
    some = rows() * 4
    for expert in (None, "sms"):
        fresh = list(predict(TwinModel.from_pretrained(twin("bert")), some, expert=expert))
        used = TwinModel.from_pretrained(twin("bert"))
        for _ in range(3):
            list(predict(used, some[:3], expert="sms"))
        assert list(predict(used, some, expert=expert)) == fresh


def test_a_window_is_full_by_rows_or_by_characters(model: TwinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_ROWS", 3)
    monkeypatch.setattr(module, "WINDOW_CHARACTERS", 8)
    texts = ["w5 w6 w7", "w5", "w6", "w7", "w8 w9 w10"]  # 8, then 2 2 2, then 9 characters
    some = [{"text": text} for text in texts]
    settings = PredictSettings()
    assert [len(found) for found in module.predict_windows(model, some, settings)] == [1, 3, 1]


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


def test_field_that_the_answer_has_is_refused(model: TwinModel, twin: Twins) -> None:
    with pytest.raises(DataError, match="row 2: the answer has a field 'label' of its own; rename the row's"):
        list(predict(model, [{"text": "w5"}, {"text": "w5 w6", "label": "gold"}]))
    headless = TwinModel.from_pretrained(twin("llama"))
    (answer,) = predict(headless, [{"text": "w5 w6", "label": "gold"}], max_new_tokens=2)
    assert answer["label"] == "gold"


def test_inputs_unlike_any_expert_say_so(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    model.router.fallback_distance.zero_()
    (answer,) = predict(model, [{"text": "w5 w6"}])
    assert answer["fallback"] is True
    assert set(answer["gate"].values()) == {0.0}


def test_rows_are_taken_as_they_come(model: TwinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_ROWS", 4)
    taken: list[int] = []

    def endless() -> Iterator[Row]:
        for index in range(10**9):
            taken.append(index)
            yield {"text": "w5"}

    stream = predict(model, endless())
    for _ in range(5):
        next(stream)
    assert len(taken) == 8


def test_no_rows_give_no_answers(model: TwinModel) -> None:
    assert list(predict(model, [])) == []


# ---- causal LMs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_lm_continues_each_text_as_it_would_alone(twin: Twins, name: str) -> None:
    model = TwinModel.from_pretrained(twin(name), dtype=torch.float64)  # no ties but exact ones
    some = rows()
    found = list(predict(model, some, max_new_tokens=5))
    alone = [answer for row in some for answer in predict(model, [row], max_new_tokens=5)]
    assert [answer["continuation"] for answer in found] == [answer["continuation"] for answer in alone]
    assert [answer["expert"] for answer in found] == [answer["expert"] for answer in alone]
    assert len({answer["continuation"] for answer in found}) > 3
    of_routing = ["expert", "gate", "fallback", "confidence", "second"]
    assert list(found[1]) == [*of_routing, "continuation", "stop_reason", "text", "id"]
    row, answer = some[1], found[1]
    inputs = model.tokenizer([row["text"]], return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, len(inputs[0]) :]
    assert answer["continuation"] == model.tokenizer.decode(written, skip_special_tokens=True)


def test_causal_lm_continues_by_one_expert_alone(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    (answer,) = predict(model, [{"text": "w5 w6"}], expert="sms", max_new_tokens=5)
    inputs = model.tokenizer(["w5 w6"], return_tensors="pt")
    plain = model.materialize(model.one_hot(["sms"])[0])
    written = plain.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 2:]
    assert answer["continuation"] == model.tokenizer.decode(written, skip_special_tokens=True)
    assert answer["gate"] == {"ag": 0.0, "sms": 1.0, "trec": 0.0}


def test_texts_stop_at_an_end_token_or_at_their_length(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    row = {"text": "w5 w6 w7"}
    (long,) = predict(model, [row], expert="sms", max_new_tokens=5)
    assert long["stop_reason"] == "length"
    second = model.tokenizer.convert_tokens_to_ids(long["continuation"].split()[1])
    model.backbone.generation_config.eos_token_id = [3, second]
    (short,) = predict(model, [row], expert="sms", max_new_tokens=5)
    assert short["stop_reason"] == "stop"
    assert short["continuation"] == " ".join(long["continuation"].split()[:2])


# ---- files


def write(path: Path, some: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_ROWS", 4)


@pytest.mark.usefixtures("small_windows")
def test_file_of_answers_is_what_predict_says(twin: Twins, model: TwinModel, tmp_path: Path) -> None:
    some = [{**row, "note": "é\u2028"} for row in rows()]
    told: list[tuple[int, int | None]] = []
    found = predict_file(
        twin("bert"),
        write(tmp_path / "x", some),
        tmp_path / "y",
        progress=lambda done, total: told.append((done, total)),
    )
    lines = (tmp_path / "y").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == list(predict(model, some))
    assert lines[-1] == ""
    left = sum(answer["fallback"] for answer in predict(model, some))
    assert (found["rows"], found["resumed"], found["fallback"]) == (18, 0, left)
    assert sum(found["experts"].values()) + left == 18
    assert told[0] == (0, 18)
    assert told[-1] == (18, 18)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_products_in_bfloat16_round_answers_and_leave_the_router_in_float32(
    twin: Twins, tmp_path: Path, name: str
) -> None:
    source, said = write(tmp_path / "x", rows()), {}
    for precision in ("float32", "bfloat16"):
        settings = PredictSettings(precision=precision, max_new_tokens=1)
        found = predict_file(twin(name), source, tmp_path / precision, settings)
        assert found["precision"] == precision
        said[precision] = [json.loads(line) for line in (tmp_path / precision).read_text().splitlines()]
    for exact, rounded in zip(said["float32"], said["bfloat16"], strict=True):
        assert exact["expert"] == rounded["expert"]
        assert exact["confidence"] == pytest.approx(rounded["confidence"], abs=0.05)
        if name == "bert":
            assert exact["score"] == pytest.approx(rounded["score"], abs=0.05)
    assert name != "bert" or any(a["score"] != b["score"] for a, b in zip(*said.values(), strict=True))


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("leave_out", [False, True])
def test_answers_of_which_the_router_is_not_sure_are_marked_or_left_out(
    twin: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave_out: bool
) -> None:
    """Some texts are of words of several experts, by a router that is less sure than these rows make it."""
    model = TwinModel.from_pretrained(twin("bert"))
    model.router.temperature.mul_(300)
    monkeypatch.setattr(TwinModel, "from_pretrained", lambda *_, **__: model)
    some = [*rows(), *({"text": f"w{5 + i} w{23 + i} w{41 + i}", "id": 18 + i} for i in range(9))]
    sure = sorted(answer["confidence"] for answer in predict(model, some))
    place = next(i for i in range(3, 20) if sure[i] < sure[i + 1])
    least = (sure[place] + sure[place + 1]) / 2
    settings = PredictSettings(uncertain_below=least, leave_out=leave_out)
    found = predict_file(twin("bert"), write(tmp_path / "x", some), tmp_path / "y", settings)
    answers = [json.loads(line) for line in (tmp_path / "y").read_text().splitlines()]
    assert answers == list(predict(model, some, uncertain_below=least, leave_out=leave_out))
    assert [a["uncertain"] for a in answers] == [a["confidence"] < least for a in answers]
    assert len(answers) == (27 - (place + 1) if leave_out else 27)
    assert (found["rows"], found["uncertain"]) == (27, place + 1)
    assert sum(found["experts"].values()) + found["fallback"] == len(answers)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uncertain_below": 1.5}, "uncertain_below is of the router's confidence, from 0 to 1, found 1.5"),
        ({"uncertain_below": 0.5, "expert": "ag"}, "from 0 to 1, found 0.5 beside expert 'ag'"),
        ({"leave_out": True}, "to leave out uncertain rows, say below which confidence they are"),
    ],
)
def test_doubt_that_means_nothing_is_refused(
    twin: Twins, model: TwinModel, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(GateError, match=words):
        list(predict(model, rows(), **settings))
    with pytest.raises(GateError, match=words):
        predict_file(twin("bert"), write(tmp_path / "x", rows()), tmp_path / "y", PredictSettings(**settings))


@pytest.mark.usefixtures("small_windows")
def test_bad_row_is_named_and_what_was_finished_is_gone_on_with(twin: Twins, tmp_path: Path) -> None:
    good = write(tmp_path / "x", rows())
    predict_file(twin("bert"), good, tmp_path / "whole")
    lines = good.read_text().splitlines(keepends=True)
    lines[9] = '{"txt": 1}\n'
    bad = tmp_path / "bad"
    bad.write_text("".join(lines))
    words = r"bad:10: the row lacks 'text' .*; found 'txt'\nthe answers of 8 rows are kept: go on with --resume$"
    with pytest.raises(DataError, match=words):
        predict_file(twin("bert"), bad, tmp_path / "y")
    with pytest.raises(OutputExistsError, match="say --resume to go on"):
        predict_file(twin("bert"), bad, tmp_path / "y")
    with pytest.raises(DataError, match=words):
        predict_file(twin("bert"), bad, tmp_path / "y", resume=True)
    bad.write_bytes(good.read_bytes())
    assert predict_file(twin("bert"), bad, tmp_path / "y", resume=True)["resumed"] == 8
    assert (tmp_path / "y").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.usefixtures("small_windows")
def test_other_rows_or_settings_are_not_gone_on_with(twin: Twins, tmp_path: Path) -> None:
    some = rows()
    bad = write(tmp_path / "x", [*some[:5], {"text": "w5", "gate": 1}])
    with pytest.raises(
        DataError, match=r"x:6: the answer has a field 'gate' of its own; rename the row's\n.* 4 rows are kept"
    ):
        predict_file(twin("bert"), bad, tmp_path / "y")
    with pytest.raises(OutputExistsError, match="left by a run with expert None, this one has 'sms'"):
        predict_file(twin("bert"), bad, tmp_path / "y", PredictSettings("sms"), resume=True)
    write(bad, some[1:])
    with pytest.raises(DataError, match="the first 4 rows of .*x are not those that the interrupted run read"):
        predict_file(twin("bert"), bad, tmp_path / "y", resume=True)
    write(bad, some)
    assert predict_file(twin("bert"), bad, tmp_path / "y", overwrite=True)["resumed"] == 0


@pytest.mark.usefixtures("small_windows")
def test_interruption_says_what_is_kept(twin: Twins, tmp_path: Path) -> None:
    source = write(tmp_path / "x", rows())

    def stop(at: int) -> Callable[[int, int | None], None]:
        def progress(done: int, _: int | None) -> None:
            if done >= at:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt, match="^$"):
        predict_file(twin("bert"), source, tmp_path / "y", progress=stop(1))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(KeyboardInterrupt, match="^\nthe answers of 8 rows are kept: go on with --resume"):
        predict_file(twin("bert"), source, tmp_path / "y", progress=stop(9))


@pytest.mark.usefixtures("small_windows")
def test_a_run_killed_before_the_file_got_its_name_is_only_finished(
    twin: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "x", rows())

    def die(*_: Any) -> None:
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "put_in_place", die)
        with pytest.raises(SystemError):
            predict_file(twin("bert"), source, tmp_path / "y")
    monkeypatch.setattr(TwinModel, "from_pretrained", die)  # no row is left, so no model is needed
    assert predict_file(twin("bert"), source, tmp_path / "y", resume=True)["resumed"] == 18
    assert len((tmp_path / "y").read_text().splitlines()) == 18


@pytest.mark.usefixtures("small_windows")
def test_standard_input_and_output(
    twin: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    source = write(tmp_path / "x", rows())
    predict_file(twin("bert"), source, tmp_path / "y")
    told: list[int | None] = []
    with source.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        found = predict_file(twin("bert"), Path("-"), Path("-"), progress=lambda _, total: told.append(total))
    assert capsysbinary.readouterr().out == (tmp_path / "y").read_bytes()
    assert found["rows"] == 18
    assert set(told) == {None}
    with pytest.raises(InputError, match="standard output keeps nothing to go on with"):
        predict_file(twin("bert"), source, Path("-"), resume=True)
    bad = write(tmp_path / "bad", [*rows()[:4], {"text": 5}])
    with pytest.raises(DataError, match=r"bad:5: 'text' must be a string, found 5$"):
        predict_file(twin("bert"), bad, Path("-"))


def test_kills_at_random_moments_cost_no_byte(twin: Twins, tmp_path: Path) -> None:
    source = write(tmp_path / "x", [{**row, "id": i} for i, row in enumerate(tiny.text_rows("sms", 200))])
    command = [sys.executable, kill_predict.__file__, str(twin("bert")), str(source), str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    kills, resumed = map(int, done.stdout.split())
    assert kills >= resumed


def test_what_is_asked_wrongly_is_refused_before_the_model_is_loaded(
    twin: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise SystemError

    folder = twin("bert")  # built before: a build loads its twin
    monkeypatch.setattr(TwinModel, "from_pretrained", never)
    good, bad = write(tmp_path / "x", rows()), write(tmp_path / "bad", [{"text": "w5", "label": 1}])
    with pytest.raises(GateError, match="unknown expert 'smss'; this twin has ag, sms, trec"):
        predict_file(folder, good, tmp_path / "y", PredictSettings("smss"))
    with pytest.raises(DataError, match="bad:1: the answer has a field 'label' of its own"):
        predict_file(folder, bad, tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "x"]
