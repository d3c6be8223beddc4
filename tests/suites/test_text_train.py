"""Training an expert of the text suite, on a model small enough for a test."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from suites.text import data, train
from suites.text.data import Row

WORDS = ("good", "bad", "film", "a", "the")


@pytest.fixture
def job(tmp_path: Path) -> train.Job:
    base = tmp_path / "base"
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    BertTokenizer(vocab=vocabulary).save_pretrained(base)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(1)
    BertModel(config).save_pretrained(base)
    rows = [Row(f"the {word} film {'a ' * length}", word) for length in range(20) for word in ("bad", "good")]
    for part in ("train", "validation"):
        data.write_rows(tmp_path / f"toy.{part}.jsonl", rows)
    recipe = train.Recipe(epochs=3, max_length=12, batch_size=4, learning_rate=1e-2, head_learning_rate=1e-2)
    target = tmp_path / "experts" / "toy"
    target.parent.mkdir()
    return train.Job("toy", 0, ("bad", "good"), "accuracy", None, len(rows), recipe, base, tmp_path, target)


def run(job: train.Job) -> tuple[list[tuple[str, int]], dict[str, torch.Tensor]]:
    threads = torch.get_num_threads()
    reported: list[tuple[str, int]] = []
    try:
        train.train(job, lambda task, step, _: reported.append((task, step)))
    finally:
        torch.set_num_threads(threads)
    return reported, load_file(job.target / "model.safetensors")


def test_expert_is_learned_and_its_folder_says_how(job: train.Job) -> None:
    reported, _ = run(job)
    assert reported[-1] == ("toy", job.steps) == ("toy", 30)
    facts = json.loads((job.target / "training.json").read_text())
    assert facts["validation_score"] == 1.0
    assert facts["max_length"] == 12
    expert = BertForSequenceClassification.from_pretrained(job.target)
    assert expert.config.id2label == {0: "bad", 1: "good"}
    assert [path.name for path in job.target.parent.iterdir()] == ["toy"]


def test_tokenizer_of_an_expert_is_that_of_the_base(job: train.Job) -> None:
    run(job)
    text = "the film " * 20
    expert, base = (AutoTokenizer.from_pretrained(folder) for folder in (job.target, job.base))
    assert expert(text) == base(text)
    assert expert.backend_tokenizer.truncation == base.backend_tokenizer.truncation


def test_same_seed_gives_the_same_weights_to_the_bit(job: train.Job) -> None:
    _, first = run(job)
    (job.target / "training.json").unlink()
    for path in job.target.iterdir():
        path.unlink()
    _, second = run(job)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batches_of_an_epoch_hold_every_row_once_and_little_padding(job: train.Job) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    rows = data.read_rows(job.data / "toy.train.jsonl")
    batches = train._batches(tokenizer, rows, job)(random.Random(0))
    assert sum(len(batch.labels) for batch in batches) == len(rows)
    padded = sum(int((batch.attention_mask == 0).sum()) for batch in batches)
    assert padded < 0.1 * sum(batch.attention_mask.numel() for batch in batches)


def test_macro_f1_is_the_mean_over_classes() -> None:
    assert train.measure("macro_f1", [0, 1, 1, 2], [0, 1, 2, 2]) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_f1_of_a_class_never_named_is_zero() -> None:
    assert train.measure("f1", [0, 0], [0, 0], positive=1) == 0.0


def test_f1_without_its_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="metric 'f1' needs the class it is about"):
        train.measure("f1", [0], [0])
