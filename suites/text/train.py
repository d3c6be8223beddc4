"""Makes one expert: a MiniLM fine-tuned in full on the training split of one task."""

import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForSequenceClassification

from suites.running import Report, begin_training, whole_folder
from suites.text.data import Metric, Row, read_rows
from twinmerge.runtime.precision import Precision, autocast

REPORT_EVERY = 5
BUCKET_BATCHES = 16


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; written into its training.json.

    Attributes:
        learning_rate: the highest, after the warm-up.
        head_learning_rate: the same for the classification head, which starts as a probe of the frozen encoder.
        probe_strength: inverse of the probe's L2 penalty (scikit-learn's C).
        warm_up: share of the steps in which the learning rate rises; then it falls to 0, both linearly.
        precision: of the forward pass. Weights and their updates are float32 in any case.
    """

    epochs: int
    max_length: int
    batch_size: int = 32
    learning_rate: float = 5e-5
    head_learning_rate: float = 2e-4
    probe_strength: float = 10.0
    warm_up: float = 0.1
    weight_decay: float = 0.01
    largest_gradient_norm: float = 1.0
    precision: Precision = "float32"


@dataclass(frozen=True)
class Job:
    """One expert to train: what, from where, to where."""

    task: str
    seed: int
    labels: tuple[str, ...]
    metric: Metric
    positive: str | None
    train_rows: int
    recipe: Recipe
    base: Path
    data: Path
    target: Path

    @property
    def steps(self) -> int:
        """How many updates the training takes."""
        return self.recipe.epochs * -(-self.train_rows // self.recipe.batch_size)


@dataclass(frozen=True)
class Batch:
    """Token ids and mask `(rows, tokens)`, label ids `(rows,)`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def train(job: Job, report: Report) -> dict[str, Any]:
    """Train one expert and put its folder into place once it is whole.

    One thread, whatever the machine has: the same seed gives the same weights for any number of workers.

    Args:
        job: what to train.
        report: told about the progress.

    Returns:
        What training.json says.
    """
    started = time.monotonic()
    seed = begin_training(job.seed, job.task)
    model = BertForSequenceClassification.from_pretrained(
        job.base,
        num_labels=len(job.labels),
        id2label=dict(enumerate(job.labels)),
        label2id={label: number for number, label in enumerate(job.labels)},
    )
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    rows = read_rows(job.data / f"{job.task}.train.jsonl")
    _start_head(model, tokenizer, rows, job)
    _fit(model, _batches(tokenizer, rows, job), job, random.Random(seed), report)
    held_out = read_rows(job.data / f"{job.task}.validation.jsonl")
    score = evaluate(model, tokenizer, held_out, job)
    facts = {
        "task": job.task,
        "seed": job.seed,
        "torch_seed": seed,
        "max_length": job.recipe.max_length,
        "labels": list(job.labels),
        "metric": job.metric,
        "positive": job.positive,
        "validation_score": score,
        "rows": len(rows),
        "validation_rows": len(held_out),
        "steps": job.steps,
        "recipe": asdict(job.recipe),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    _save(model, facts, job)
    return facts


def evaluate(model: Any, tokenizer: Any, rows: Sequence[Row], job: Job) -> float:
    """Score a model on rows by the metric of the task, in float32."""
    model.eval()
    truth: list[int] = []
    predicted: list[int] = []
    with torch.inference_mode():
        for batch in _make_batches(_encode(tokenizer, rows, job), 64, tokenizer):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            predicted += logits.argmax(-1).tolist()
            truth += batch.labels.tolist()
    positive = job.labels.index(job.positive) if job.positive is not None else None
    return measure(job.metric, truth, predicted, positive)


def measure(metric: Metric, truth: Sequence[int], predicted: Sequence[int], positive: int | None = None) -> float:
    """Compute accuracy, the F1 of one class, or the mean F1 of the classes that occur.

    Args:
        metric: which of the three.
        truth: class numbers.
        predicted: class numbers, as many.
        positive: the class of `f1`.

    Returns:
        The score, 0 to 1.

    Example:
        >>> measure("accuracy", [0, 1, 1, 1], [0, 1, 0, 0])
        0.5
        >>> measure("f1", [0, 1, 1, 1], [0, 1, 0, 0], positive=1)
        0.5
    """
    pairs = list(zip(truth, predicted, strict=True))
    if metric == "accuracy":
        return sum(true == guess for true, guess in pairs) / len(pairs)
    if metric == "f1" and positive is None:
        raise ValueError("metric 'f1' needs the class it is about, `positive`")
    classes = [positive] if metric == "f1" else sorted({*truth, *predicted})
    scores = []
    for which in classes:
        right = sum(true == guess == which for true, guess in pairs)
        named = sum(true == which for true, _ in pairs) + sum(guess == which for _, guess in pairs)
        scores.append(2 * right / named if named else 0.0)
    return sum(scores) / len(scores)


def _start_head(model: Any, tokenizer: Any, rows: Sequence[Row], job: Job) -> None:
    """Set the head to a logistic regression on the frozen encoder.

    A head of random weights sends the encoder far away before it means anything (Kumar et al., arXiv:2202.10054); from
    a probe, experts are better and lie nearer to the base.
    """
    from sklearn.linear_model import LogisticRegression

    model.eval()
    features, labels = [], []
    with torch.inference_mode():
        for batch in _make_batches(_encode(tokenizer, rows, job), 64, tokenizer):
            outputs = model.bert(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            features.append(outputs.pooler_output)
            labels.append(batch.labels)
    probe = LogisticRegression(C=job.recipe.probe_strength, max_iter=1000)
    probe.fit(torch.cat(features).numpy(), torch.cat(labels).numpy())
    weight, bias = torch.from_numpy(probe.coef_).float(), torch.from_numpy(probe.intercept_).float()
    if len(probe.classes_) == 2:  # scikit-learn keeps one row for two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(float(bias.min()))  # of a label that no training row has
        model.classifier.weight[torch.from_numpy(probe.classes_)] = weight
        model.classifier.bias[torch.from_numpy(probe.classes_)] = bias


def _fit(
    model: Any, batches_of_epoch: Callable[[random.Random], list[Batch]], job: Job, order: random.Random, report: Report
) -> None:
    recipe = job.recipe
    groups = [
        {"params": list(model.bert.parameters()), "lr": recipe.learning_rate},
        {"params": list(model.classifier.parameters()), "lr": recipe.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    warm_up_steps = max(1, round(recipe.warm_up * job.steps))

    def rate(step: int) -> float:
        return min((step + 1) / warm_up_steps, (job.steps - step) / max(1, job.steps - warm_up_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    step = 0
    for _ in range(recipe.epochs):
        for batch in batches_of_epoch(order):
            with autocast(recipe.precision):
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = cross_entropy(logits.float(), batch.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.largest_gradient_norm)
            optimizer.step()
            schedule.step()
            step += 1
            if step % REPORT_EVERY == 0 or step == job.steps:
                report(job.task, step, loss.item())


def _batches(tokenizer: Any, rows: Sequence[Row], job: Job) -> Callable[[random.Random], list[Batch]]:
    """A function that gives the batches of one epoch: texts of like length together, batches in random order."""
    encoded = _encode(tokenizer, rows, job)

    def of_epoch(order: random.Random) -> list[Batch]:
        shuffled = order.sample(encoded, len(encoded))
        bucket = job.recipe.batch_size * BUCKET_BATCHES
        for start in range(0, len(shuffled), bucket):
            shuffled[start : start + bucket] = sorted(shuffled[start : start + bucket], key=lambda row: len(row[0]))
        batches = list(_make_batches(shuffled, job.recipe.batch_size, tokenizer))
        order.shuffle(batches)
        return batches

    return of_epoch


def _encode(tokenizer: Any, rows: Sequence[Row], job: Job) -> list[tuple[list[int], int]]:
    texts = [row.text for row in rows]
    ids = tokenizer(texts, truncation=True, max_length=job.recipe.max_length)["input_ids"]
    return [(row_ids, job.labels.index(row.label)) for row_ids, row in zip(ids, rows, strict=True)]


def _make_batches(encoded: Sequence[tuple[list[int], int]], size: int, tokenizer: Any) -> list[Batch]:
    batches = []
    for start in range(0, len(encoded), size):
        rows = encoded[start : start + size]
        padded = tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt")
        labels = torch.tensor([label for _, label in rows])
        batches.append(Batch(padded["input_ids"], padded["attention_mask"], labels))
    return batches


def _save(model: Any, facts: dict[str, Any], job: Job) -> None:
    """Write the folder, so that one in place is whole."""
    with whole_folder(job.target) as folder:
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(job.base)  # anew: one that was used saves its last truncation
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
