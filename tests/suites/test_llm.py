"""The suite of language models: rows, splits, trainings and combined adapters, without a network."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from suites.llm import data, prepare, train
from suites.llm.combine import combine
from suites.text.data import DataError, Row
from tests import tiny


def test_translations_are_short_and_the_first_of_each_sentence() -> None:
    lines = [
        "Go.\tVe.\tCC",
        "I am here.\tEstoy aquí.\tCC",
        "I am here.\tAquí estoy.\tCC",
        " ".join("abcdefghi") + "\tx\tCC",
    ]
    assert data.parse_translations("\n".join(lines)) == [Row("I am here.", "Estoy aquí.")]


def test_glosses_are_of_single_plain_words() -> None:
    lines = [
        "  1 the licence",
        '00001740 03 n 01 entity 0 000 | that which exists; "an example"',
        "00001741 03 n 01 physical_entity 0 000 | a thing",
        "00001742 03 n 01 Paris 0 000 | a town",
    ]
    assert data.parse_glosses("\n".join(lines)) == [Row("that which exists", "entity")]


def test_sums_are_right_and_no_question_comes_twice() -> None:
    rows = data.make_sums("")
    assert all(eval(row.text) == int(row.label) for row in rows)
    assert len({row.text for row in rows}) == len(rows)
    assert rows == data.make_sums("")


def test_parts_are_disjoint_and_test_rows_are_the_same_for_every_seed() -> None:
    rows = [Row(f"prompt {n}", str(n)) for n in range(1200)]
    first, second = data.split("sums", rows, 0), data.split("sums", rows[::-1], 1)
    assert {part: len(own) for part, own in first.items()} == data.SIZES
    assert first["test"] == second["test"]
    assert first["train"] != second["train"]
    assert len({row.text for own in first.values() for row in own}) == sum(data.SIZES.values())
    with pytest.raises(DataError, match="task 'sums' has 10 clean rows; 1160 are needed"):
        data.split("sums", rows[:10], 0)


def test_options_name_experts_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.parse([]).experts == list(data.TASKS)
    for arguments, said in (
        (["--tasks", "poetry"], "unknown expert 'poetry'"),
        (["--tasks", "peft_weighted"], "peft_weighted combines the adapters of all tasks"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--workers", "0"], "--workers must be 1 or more"),
    ):
        with pytest.raises(SystemExit, match="2"):
            prepare.parse(arguments)
        assert said in capsys.readouterr().err


@pytest.fixture
def job(tmp_path: Path) -> train.Job:
    tiny.llama().save_pretrained(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(3)
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [Row(f"w{5 + n % 20} w{6 + n % 20}", f"w{7 + n % 20}") for n in range(24)]
    data.write_rows(tmp_path / "rows.jsonl", rows)
    assert data.read_rows(tmp_path / "rows.jsonl") == rows
    files = (tmp_path / "rows.jsonl",)
    recipe = train.Recipe(rank=2, alpha=4, epochs=3)
    return train.Job("first", 0, 24, recipe, tmp_path / "base", files, files, tmp_path / "first")


def test_a_training_learns_the_answers_and_gives_the_same_bits_again(job: train.Job) -> None:
    steps: list[float] = []
    facts = train.train(job, lambda task, step, loss: steps.append(loss))
    assert len(steps) == job.steps == 9
    assert facts["validation_score"] < steps[0]
    again = dataclasses.replace(job, target=job.target.with_name("again"))
    train.train(again, lambda *_: None)
    files = [one.target / "adapter_model.safetensors" for one in (job, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    full = dataclasses.replace(job, recipe=train.FULL, target=job.target.with_name("full"))
    train.train(full, lambda *_: None)
    assert {"model.safetensors", "tokenizer.json", "training.json"} <= {path.name for path in full.target.iterdir()}


def test_peft_combines_adapters_into_one_of_their_rank(job: train.Job) -> None:
    train.train(job, lambda *_: None)
    other = dataclasses.replace(job, task="second", target=job.target.with_name("second"))
    train.train(other, lambda *_: None)
    target = job.target.with_name("both")
    combine(job.base, [job.target, other.target], target)
    first, second, both = (load_file(path / "adapter_model.safetensors") for path in (job.target, other.target, target))
    assert {name: one.shape for name, one in both.items()} == {name: one.shape for name, one in first.items()}
    name = next(name for name in both if name.endswith("q_proj.lora_A.weight"))
    scale = job.recipe.alpha / job.recipe.rank  # PEFT puts the root of weight times scale on each factor
    mean = (first[name] + second[name]) * (0.5 * scale) ** 0.5
    assert torch.allclose(both[name], mean, atol=1e-6)
