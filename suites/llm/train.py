"""Makes one expert: a LoRA adapter of the language model, or a full fine-tune, trained on the answers of one task."""

import json
import platform
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from suites.llm.data import read_rows
from suites.running import Report, begin_training, whole_folder
from twinmerge.runtime.precision import Precision, autocast

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_NO_LABEL = -100


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; written into its training.json.

    Attributes:
        modules: linear layers that get a pair; none is a full fine-tune.
        learning_rate: the highest, after the warm-up.
        warm_up: share of the steps in which the learning rate rises; then it falls to 0, both linearly.
        precision: of the forward pass. Weights and their updates are float32 in any case.
    """

    modules: tuple[str, ...] = (*ATTENTION, *MLP)
    rank: int = 16
    alpha: int = 32
    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 1e-3
    warm_up: float = 0.1
    largest_gradient_norm: float = 1.0
    precision: Precision = "float32"


FULL = Recipe(modules=(), learning_rate=5e-5)


@dataclass(frozen=True)
class Job:
    """One expert to train: what, from where, to where.

    Attributes:
        task: its name.
        data: files of rows; several are mixed.
        validation: files of rows that the loss is reported on.
    """

    task: str
    seed: int
    train_rows: int
    recipe: Recipe
    base: Path
    data: tuple[Path, ...]
    validation: tuple[Path, ...]
    target: Path

    @property
    def steps(self) -> int:
        """How many updates the training takes."""
        return self.recipe.epochs * -(-self.train_rows // self.recipe.batch_size)


@dataclass(frozen=True)
class Batch:
    """Tokens, mask, and the tokens that are to be written, -100 elsewhere, all `(rows, tokens)`."""

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
        What training.json says; the `validation_score` is the mean loss of a token of the answers, in nats.
    """
    started = time.monotonic()
    seed = begin_training(job.seed, job.task)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    if job.recipe.modules:
        config = peft.LoraConfig(
            r=job.recipe.rank,
            lora_alpha=job.recipe.alpha,
            target_modules=list(job.recipe.modules),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT, about an old name in transformers
            model = peft.get_peft_model(model, config)
    encoded = [one for path in job.data for one in encode(tokenizer, path)]
    _fit(model, encoded, job, random.Random(seed), report)
    held_out = [one for path in job.validation for one in encode(tokenizer, path)]
    facts = {
        "task": job.task,
        "seed": job.seed,
        "torch_seed": seed,
        "metric": "loss",
        "validation_score": _held_out_loss(model, held_out, job),
        "rows": len(encoded),
        "validation_rows": len(held_out),
        "steps": job.steps,
        "recipe": asdict(job.recipe),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    _save(model, facts, job)
    return facts


def encode(tokenizer: Any, path: Path) -> list[tuple[list[int], int]]:
    """Prompt, answer and end of each row as tokens, and how many of them are the prompt's."""
    rows = read_rows(path)
    prompts = tokenizer([row.text for row in rows])["input_ids"]
    answers = tokenizer([f" {row.label}" for row in rows])["input_ids"]
    return [
        ([*prompt, *answer, tokenizer.eos_token_id], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _fit(model: Any, encoded: Sequence[tuple[list[int], int]], job: Job, order: random.Random, report: Report) -> None:
    recipe = job.recipe
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    warm_up_steps = max(1, round(recipe.warm_up * job.steps))

    def rate(step: int) -> float:
        return min((step + 1) / warm_up_steps, (job.steps - step) / max(1, job.steps - warm_up_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    step = 0
    for _ in range(recipe.epochs):
        for batch in _batches(order.sample(encoded, len(encoded)), recipe.batch_size):
            loss = _loss(model, batch, recipe.precision)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, recipe.largest_gradient_norm)
            optimizer.step()
            schedule.step()
            step += 1
            report(job.task, step, loss.item())


def _loss(model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; logits are made of no other token, as most of the cost is theirs."""
    causal: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with autocast(precision):
        states = causal.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        asked = batch.labels[:, 1:] != _NO_LABEL
        logits = causal.lm_head(states[:, :-1][asked])
    return cross_entropy(logits.float(), batch.labels[:, 1:][asked])


def _held_out_loss(model: Any, encoded: Sequence[tuple[list[int], int]], job: Job) -> float:
    model.eval()
    with torch.inference_mode():
        batches = _batches(encoded, job.recipe.batch_size)
        losses = [float(_loss(model, batch, job.recipe.precision)) for batch in batches]
    return sum(losses) / len(losses)


def _batches(encoded: Sequence[tuple[list[int], int]], size: int) -> list[Batch]:
    """Rows in order, padded on the right."""
    found = []
    for start in range(0, len(encoded), size):
        rows = encoded[start : start + size]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, _NO_LABEL)
        for index, (own, prompt) in enumerate(rows):
            ids[index, : len(own)] = torch.tensor(own)
            mask[index, : len(own)] = 1
            labels[index, prompt : len(own)] = ids[index, prompt : len(own)]
        found.append(Batch(ids, mask, labels))
    return found


def _save(model: Any, facts: dict[str, Any], job: Job) -> None:
    """Write the folder, so that one in place is whole."""
    with whole_folder(job.target) as folder:
        model.save_pretrained(folder)
        if not job.recipe.modules:
            AutoTokenizer.from_pretrained(job.base).save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
