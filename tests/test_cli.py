"""The program, run in process on tiny models: what it prints, what it writes, what it refuses."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from tests import tiny
from twinmerge.cli import main
from twinmerge.cli.parser import FORMS
from twinmerge.files.checkpoint import Checkpoint

RECIPE = """
base: base
experts:
  trec: {model: trec, router_data: trec.jsonl}
  sms: {model: sms, router_data: sms.jsonl}
  ag: {model: ag, router_data: ag.jsonl}
exclusive: {rank: 4}
router: {samples_per_expert: 20}
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tiny.Family:
    root = tmp_path_factory.mktemp("family")
    made = tiny.make_family(root, tiny.bert(), tiny.transformers.BertForSequenceClassification)
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "bad.jsonl").write_text('{"text": "w5"}\n{"text": "w6", "score": NaN}\n')
    return made


@pytest.fixture(scope="module")
def twin(family: tiny.Family) -> Path:
    out = family.root / "twin"
    assert main(["build", str(family.root / "recipe.yaml"), "--out", str(out)]) == 0
    return out


def test_methods_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert "tsv_m: " in printed
    assert "  arXiv:2212.04089; protocol A; merge, shared expert, contestant\n" in printed
    assert '  options: weight 1.0, normalize true, scaling 1.0, density 0.2, scope "model"\n' in printed
    assert "  options: none\n" in printed
    assert main(["methods", "--json"]) == 0
    found = {system["name"]: system for system in json.loads(capsys.readouterr().out)}
    assert found["fisher"]["data"] == "unlabelled inputs of each expert"
    assert found["tsv_m"]["options"] == {"scaling": 1.0}


def test_inspect_shows_experts_bytes_and_router(twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(twin)]) == 0
    printed = capsys.readouterr().out
    for word in ("trec", "sms", "ag", "energy kept", "exclusive", "held-out accuracy", "calibration error", "seed 0"):
        assert word in printed
    manifest = json.loads((twin / "twin.json").read_text())
    for entry in (manifest["base"], *manifest["experts"].values()):
        assert entry["files"]["model.safetensors"]["sha256"][:12] in printed


def test_inspect_as_json_adds_up_to_the_folder(twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(twin), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["bytes"].values()) == sum(p.stat().st_size for p in twin.rglob("*") if p.is_file())
    assert set(found["experts"]) == {"trec", "sms", "ag"}
    for name, entry in found["experts"].items():
        files = [path for path in (twin / "experts" / name).rglob("*") if path.is_file()]
        assert entry["exclusive_bytes"] + entry["head_bytes"] == sum(path.stat().st_size for path in files)
        assert {"rank_mean", "rank_max", "energy_kept", "source", "licence", "files"} <= set(entry)
    assert {"accuracy", "calibration_error", "temperature"} <= set(found["router"])


def test_verify_counts_files(twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(twin), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["intact"] is True


def test_predict_answers_in_input_order_and_keeps_fields(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "id": i} for i, row in enumerate(tiny.text_rows("sms", 5) + tiny.text_rows("trec", 5))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(["predict", str(twin), "--input", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "y.jsonl")]) == 0
    )
    answers = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    assert [a["id"] for a in answers] == list(range(10))
    assert [a["text"] for a in answers] == [row["text"] for row in rows]
    assert all(sum(a["gate"].values()) == pytest.approx(1, abs=1e-4) or a["fallback"] for a in answers)
    assert all(a["label"].startswith("LABEL_") and 0 <= a["score"] <= 1 for a in answers)
    printed = capsys.readouterr()
    assert "10 rows" in printed.out
    assert printed.err == ""  # no terminal


def test_predict_says_as_json_what_it_did_and_writes_to_standard_output(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "w5 w6"}\n' * 3)
    predict = ["predict", str(twin), "--input", str(tmp_path / "x.jsonl"), "--json", "--expert", "ag"]
    assert main([*predict, "--output", str(tmp_path / "y.jsonl")]) == 0
    said = {"output": str(tmp_path / "y.jsonl"), "rows": 3, "resumed": 0, "experts": {"ag": 3}}
    said |= {"fallback": 0, "uncertain": None, "unreadable": 0, "precision": "float32"}
    assert json.loads(capsys.readouterr().out) == said
    with (tmp_path / "x.jsonl").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        arguments = ["predict", str(twin), "--input", "-", "--output", "-", "--json", "--expert", "ag"]
        assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "y.jsonl").read_text()
    assert json.loads(printed.err) == {**said, "output": "-"}


def test_predict_shows_rows_a_second_and_time_on_a_terminal(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "x.jsonl").write_text('{"text": "w5 w6"}\n' * 9)
    predict = ["predict", str(twin), "--input", str(tmp_path / "x.jsonl"), "--batch-size", "1", "--expert", "ag"]
    assert main([*predict, "--output", str(tmp_path / "y.jsonl")]) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"predicting .* 9/9 +[\d,.]+/s +\d:\d\d:\d\d", shown)


def test_predict_goes_on_after_a_bad_row(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinmerge.jobs.predict.WINDOW_ROWS", 2)
    (tmp_path / "x.jsonl").write_text('{"text": "w5 w6"}\n' * 3 + "w7\n")
    predict = ["predict", str(twin), "--input", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "y.jsonl")]
    assert main(predict) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.jsonl:4: not JSON" in line
    assert line.endswith("the answers of 2 rows are kept: go on with --resume")
    (tmp_path / "x.jsonl").write_text('{"text": "w5 w6"}\n' * 5)
    assert main([*predict, "--resume"]) == 0
    assert "5 rows, 2 of them by the run before" in capsys.readouterr().out
    assert main([*predict, "--overwrite"]) == 0


def test_interrupted_prediction_says_what_is_kept(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        stopped = KeyboardInterrupt()
        stopped.add_note("the answers of 9 rows are kept: go on with --resume")
        raise stopped

    monkeypatch.setattr("twinmerge.jobs.predict.predict_file", interrupt)
    assert main(["predict", str(twin), "--input", "x", "--output", str(tmp_path / "y.jsonl")]) == 130
    assert capsys.readouterr().err == (
        "twinmerge: error: interrupted; the answers of 9 rows are kept: go on with --resume\n"
    )


def test_experts_come_and_go(
    family: tiny.Family, twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, root = tmp_path / "copy", family.root
    more = ["--router-data", str(root / "sms.jsonl")]
    assert main(["add", str(twin), "--expert", f"new={root / 'sms'}", *more, "--out", str(copy)]) == 0
    assert main(["remove", str(copy), "--expert", "ag"]) == 0
    assert main(["replace", str(copy), "--expert", f"new={root / 'trec'}", *more, "--root", str(root), "--json"]) == 0
    printed = capsys.readouterr().out
    assert "a twin of 4 experts" in " ".join(printed.split())  # tables wrap
    assert ": remove ag" in printed
    found = json.loads(printed[printed.index("\n{") :])
    assert [change["change"] for change in found["changes"]] == ["add", "remove", "replace"]
    assert list(found["experts"]) == ["new", "sms", "trec"]
    assert main(["verify", str(copy)]) == 0


def test_export_says_what_was_written(twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["export", str(twin), "--out", str(tmp_path / "out"), "--overwrite"]
    assert main([*out, "--to", "dense", "--gate", "sms=0.7, trec=.3"]) == 0
    assert "dense of" in capsys.readouterr().out
    assert main([*out, "--to", "peft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"]["sms"]["beside"] == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ag", "sms", "trec", "export.json"}


def test_forms_of_export_are_those_of_the_library() -> None:
    from twinmerge.jobs.export import Form

    assert get_args(Form) == FORMS


@pytest.mark.parametrize("gate", ["sms", "=1", "sms=x", "sms=1,sms=2", "sms=inf", ""])
def test_gates_that_cannot_be_read_are_wrong_usage(gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "twin", "--to", "dense", "--out", "out", f"--gate={gate}"])
    assert stopped.value.code == 2
    assert "must be weights such as" in capsys.readouterr().err


def test_predict_with_an_expert_uses_it_alone(twin: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "w5 w6"}) + "\n")
    arguments = ["predict", str(twin), "--input", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "y.jsonl")]
    assert main([*arguments, "--expert", "ag"]) == 0
    answer = json.loads((tmp_path / "y.jsonl").read_text())
    assert answer["expert"] == "ag"
    assert answer["gate"] == {"ag": 1.0, "sms": 0.0, "trec": 0.0}


def test_eval_writes_results_and_a_report(
    family: tiny.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in family.experts:
        rows = [{**row, "label": f"LABEL_{i % tiny.LABELS[name]}"} for i, row in enumerate(tiny.text_rows(name, 12))]
        for split in ("router", "validation", "test"):
            (family.root / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(
        f"""
name: tiny
root: {family.root}
base: base
experts: "{{task}}"
data: "{{task}}.{{split}}.jsonl"
tasks: {{ag: {{}}, sms: {{}}, trec: {{}}}}
shared: {{method: average}}
contestants:
  average: {{title: the mean, kind: static, shared: {{method: average}}}}
  twin: {{title: the twin, kind: twin, shared: {{method: average}}, exclusive: {{rank: 2}}}}
"""
    )
    assert main(["eval", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert {"results.json", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "{root}/recipe.yaml", "--out", "{root}/twin"], "exists"),
        (["build", "{root}/nowhere.yaml", "--out", "{root}/new"], "cannot be read"),
        (["inspect", "{root}/base"], "is no twin: twin.json cannot be read"),
        (["predict", "{root}/twin", "--input", "{root}/no.jsonl", "--output", "{root}/new"], "cannot read rows"),
        (["predict", "{root}/twin", "--input", "{root}/ag.jsonl", "--output", "{root}/sms.jsonl"], "exists already"),
        (
            ["predict", "{root}/twin", "--input", "{root}/ag.jsonl", "--output", "{root}/no/y"],
            "no is no folder; make it",
        ),
        (
            ["predict", "{root}/twin", "--input", "{root}/ag.jsonl", "--output", "-", "--resume"],
            "standard output keeps",
        ),
        (
            ["predict", "{root}/twin", "--input", "{root}/bad.jsonl", "--output", "{root}/new"],
            "bad.jsonl:2: not JSON: NaN",
        ),
        (["predict", "{root}/ag", "--input", "{root}/ag.jsonl", "--output", "{root}/new"], "is no twin"),
        (
            ["predict", "{root}/twin", "--input", "{root}/ag.jsonl", "--output", "{root}/new", "--expert", "spam"],
            "unknown expert 'spam'; this twin has ag, sms, trec",
        ),
        (["eval", "{root}/nowhere.yaml", "--out", "{root}/new"], "cannot be read"),
        (["remove", "{root}/twin", "--expert", "spam"], "unknown expert 'spam'; this twin has ag, sms, trec"),
        (["remove", "{root}/twin", "--expert", "ag", "--root", "{root}/base"], "/base/trec.jsonl is not there"),
        (
            ["add", "{root}/twin", "--expert", "sms={root}/ag", "--router-data", "{root}/ag.jsonl"],
            "the twin has an expert 'sms' already",
        ),
        (["export", "{root}/twin", "--to", "dense", "--out", "{root}/new"], "give weights by expert (--gate)"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    twin: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = twin.parent
    before = sorted(path.name for path in root.iterdir())
    assert main([argument.format(root=root) for argument in arguments]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("twinmerge: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(path.name for path in root.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bild"],
        ["predict", "twin"],
        ["predict", "t", "--input", "-", "--output", "-", "--batch-size", "0"],
        ["predict", "t", "--input", "-", "--output", "-", "--batch-tokens", "x"],
        ["add", "t", "--expert", "x"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_a_damaged_twin_is_named(twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(twin, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(copy)]) == 2
    assert "model.safetensors changed" in capsys.readouterr().err


def test_interruption_leaves_nothing(
    twin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twinmerge.jobs.build.write_weights", interrupt)
    root = twin.parent
    before = sorted(path.name for path in root.iterdir())
    assert main(["build", str(root / "recipe.yaml"), "--out", str(root / "new")]) == 130
    assert sorted(path.name for path in root.iterdir()) == before
    assert "interrupted" in capsys.readouterr().err


def test_plan_of_a_twin_says_what_the_build_needs(
    family: tiny.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(family.root / "recipe.yaml"), "--json", "--executor", "serial"]) == 0
    found = json.loads(capsys.readouterr().out)
    base = Checkpoint.open(family.base)
    assert (found["tensors"], found["layers"], found["vocabulary"]) == (len(base.specs), 2, tiny.VOCABULARY)
    assert found["tokenizer"] == "tokenizer.json"
    assert found["experts"]["sms"]["head"] == "BertForSequenceClassification"
    assert found["read_bytes"] > 3 * base.nbytes
    assert found["workers"] == 1
    assert main(["build", str(family.root / "recipe.yaml"), "--out", str(tmp_path / "twin")]) == 0
    assert sum(p.stat().st_size for p in (tmp_path / "twin").rglob("*.safetensors")) < found["disk_bytes"] * 1.5
    capsys.readouterr()
    assert main(["plan", str(family.root / "recipe.yaml"), "--memory", "1MB"]) == 2
    assert "--memory must be at least" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["abc", "+-5", "0", "-1", "1.5", ""])
@pytest.mark.parametrize("option", ["--batch-size", "--batch-tokens", "--max-new-tokens"])
def test_number_that_is_none_is_refused_in_plain_words(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", "twin", "--input", "x", "--output", "y", f"{option}={text}"])
    assert caught.value.code == 2
    assert f"argument {option}: must be a whole number, 1 or more, found {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["abc", "-0.1", "1.01", "nan", ""])
def test_confidence_that_is_none_is_refused_in_plain_words(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", "twin", "--input", "x", "--output", "y", f"--uncertain-below={text}"])
    assert caught.value.code == 2
    assert f"--uncertain-below: must be a number from 0 to 1, found {text!r}" in capsys.readouterr().err
