"""lm-evaluation-harness asks a twin: gates from contexts alone, scores those of the merged model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.tiny import EXPERTS, WORDS, families, text_rows
from twinmerge.errors import GateError, InputError
from twinmerge.eval.lm_eval import TwinLM
from twinmerge.jobs.build import build

TASK = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n'
WRITES = (
    'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["w5 w5"], max_gen_toks: 4}\n'
    "metric_list: [{metric: exact_match}]\n"
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = families(tmp_path_factory.mktemp("lm_eval"))("llama")
    out = family.root / "twin"
    build(family.recipe(exclusive={"rank": 64, "embeddings": "exclusive"}), out)
    return out


def ask(*pairs: tuple[str, str]) -> list[Any]:
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def questions() -> list[tuple[str, str]]:
    """An expert's own context, and an answer in another expert's words: seen, it would sway the router."""
    others = {name: text_rows(EXPERTS[index - 1], 10)[4]["text"] for index, name in enumerate(EXPERTS)}
    return [(row["text"], " " + others[name]) for name in EXPERTS for row in text_rows(name, 4)]


def plain(lm: TwinLM, gate: torch.Tensor) -> HFLM:
    return HFLM(pretrained=lm.model.materialize(gate), tokenizer=lm.tokenizer, batch_size=4)


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_the_model_merged_by_the_gate_of_the_context(twin: Path) -> None:
    lm = TwinLM(pretrained=str(twin), batch_size=4)
    found = lm.loglikelihood(ask(*questions()), disable_tqdm=True)
    swayed = 0
    for (context, answer), (score, greedy) in zip(questions(), found, strict=True):
        gate = lm.model.route(**lm.tokenizer([context], return_tensors="pt"))[0]
        expected = plain(lm, gate).loglikelihood(ask((context, answer)), disable_tqdm=True)[0]
        assert (score, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
        seen = lm.model.route(**lm.tokenizer([context + answer], return_tensors="pt"))[0]
        other = plain(lm, seen).loglikelihood(ask((context, answer)), disable_tqdm=True)[0]
        swayed += abs(other[0] - score) > 1e-3
    assert swayed > 0  # with the answers seen, scores are others


@pytest.mark.filterwarnings("ignore")
def test_an_expert_alone_and_a_text_without_prompt(twin: Path) -> None:
    routed, shared, expert = (TwinLM(pretrained=str(twin), expert=one, batch_size=2) for one in (None, "shared", "sms"))
    assert expert.loglikelihood(ask(*questions()), disable_tqdm=True) == [
        (pytest.approx(score, abs=1e-4), greedy)
        for score, greedy in plain(expert, expert.model.one_hot(["sms"])[0]).loglikelihood(
            ask(*questions()), disable_tqdm=True
        )
    ]
    texts = [Instance("loglikelihood_rolling", {}, (row["text"],), 0) for row in text_rows("ag", 3)]
    alone = plain(shared, torch.zeros(3)).loglikelihood_rolling(texts, disable_tqdm=True)
    for lm in (routed, shared):
        assert lm.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(alone, abs=1e-4)
    empty = ask(("", questions()[0][1]))
    assert routed.loglikelihood(empty, disable_tqdm=True)[0][0] == pytest.approx(
        shared.loglikelihood(empty, disable_tqdm=True)[0][0], abs=1e-5
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "rest"), [("multiple_choice", CHOICES), ("generate_until", WRITES)])
def test_a_local_task_runs_offline(
    twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rest: str
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [
        {"question": row["text"], "choices": [f"w{5 + WORDS}", "w7 w8"], "answer": 1}
        for name in EXPERTS
        for row in text_rows(name, 2)
    ]
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choose.yaml").write_text(TASK.format(file=file, kind=kind) + rest)
    results = simple_evaluate(
        "twinmerge",
        model_args={"pretrained": str(twin), "max_length": 32},
        tasks=["choose"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        random_seed=None,
    )
    assert results["n-samples"]["choose"]["effective"] == len(rows)
    assert results["config"]["twin"] == str(twin)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"peft": "adapter"}, InputError, "model_args: peft=adapter means nothing for a twin; known are"),
        ({"parallelize": True}, InputError, "model_args: parallelize=True means nothing"),
        ({"expert": "nobody"}, GateError, "unknown expert 'nobody'; this twin has ag, sms, trec, and 'shared'"),
    ],
)
def test_refusals(twin: Path, args: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TwinLM(pretrained=str(twin), **args)
