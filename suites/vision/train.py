"""Trains the models of the vision suite: one expert for each task, and a small ViT on a mix of pictures."""

import io
import json
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import EfficientNetForImageClassification, ViTForImageClassification

from suites.running import Report, begin_training, whole_folder
from suites.vision.base import processor, small_vit
from suites.vision.data import Picture, read_parquet
from twinmerge.hf.loading import quiet

Network = Literal["lite0", "vit"]
REPORT_EVERY = 5


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; written into its training.json.

    Attributes:
        learning_rate: the highest, after the warm-up.
        head_learning_rate: the same for the classification head, which starts as a probe of the frozen network.
        probe_strength: inverse of the probe's L2 penalty (scikit-learn's C).
        warm_up: share of the steps in which the learning rate rises; then it falls to 0, both linearly.
    """

    epochs: int
    learning_rate: float
    head_learning_rate: float
    batch_size: int = 32
    probe_strength: float = 1.0
    warm_up: float = 0.1
    weight_decay: float = 0.01
    largest_gradient_norm: float = 1.0


RECIPES: dict[Network, Recipe] = {
    "lite0": Recipe(epochs=3, learning_rate=5e-4, head_learning_rate=2e-3),
    "vit": Recipe(epochs=4, learning_rate=3e-4, head_learning_rate=1e-3),
}
PRETRAINING = Recipe(epochs=5, learning_rate=1e-3, head_learning_rate=1e-3, batch_size=64, weight_decay=0.05)


@dataclass(frozen=True)
class Job:
    """One network to train: what, on which rows, to where.

    Attributes:
        task: the task's name.
        network: which kind.
        base: what it starts from; None is random weights, and the network is kept without its head.
        rows: files of training rows.
        validation: files of held-out rows.
    """

    task: str
    seed: int
    network: Network
    labels: tuple[str, ...]
    train_rows: int
    recipe: Recipe
    base: Path | None
    rows: tuple[Path, ...]
    validation: tuple[Path, ...]
    target: Path

    @property
    def steps(self) -> int:
        """How many updates the training takes."""
        return self.recipe.epochs * -(-self.train_rows // self.recipe.batch_size)


def train(job: Job, report: Report) -> dict[str, Any]:
    """Train one network and put its folder into place once it is whole.

    One thread, whatever the machine has: the same seed gives the same weights for any number of workers.

    Args:
        job: what to train.
        report: told about the progress.

    Returns:
        What training.json says.
    """
    started = time.monotonic()
    seed = begin_training(job.seed, job.network, job.task)
    model = _start(job)
    pixels, truth = tensors([one for path in job.rows for one in read_parquet(path)], job.labels)
    if job.base is not None:
        _start_head(model, pixels, truth, job.recipe)
    _fit(model, pixels, truth, job, random.Random(seed), report)
    held_out = tensors([one for path in job.validation for one in read_parquet(path)], job.labels)
    facts = {
        "task": job.task,
        "network": job.network,
        "seed": job.seed,
        "torch_seed": seed,
        "labels": list(job.labels),
        "metric": "accuracy",
        "validation_score": accuracy(model, *held_out),
        "rows": len(truth),
        "validation_rows": len(held_out[1]),
        "steps": job.steps,
        "recipe": asdict(job.recipe),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    save(model if job.base is not None else model.base_model, job.target, facts)
    return facts


def tensors(pictures: Sequence[Picture], labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Pictures as the networks read them, (row, 3, height, width), and the numbers of their labels, (row,)."""
    read = processor()
    images = [Image.open(io.BytesIO(one.png)).convert("RGB") for one in pictures]
    pixels: Tensor = read(images=images, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([labels.index(one.label) for one in pictures])


def accuracy(model: Any, pixels: Tensor, truth: Tensor) -> float:
    """The share of pictures that a network names right, 0 to 1."""
    model.eval()
    with torch.inference_mode():
        named = torch.cat([model(pixel_values=part).logits.argmax(dim=1) for part in torch.split(pixels, 64)])
    return float((named == truth).float().mean())


def save(model: Any, target: Path, facts: dict[str, Any] | None = None) -> None:
    """Write a folder, so that one in place is whole."""
    with whole_folder(target) as folder, quiet():
        model.save_pretrained(folder)
        processor().save_pretrained(folder)
        if facts is not None:
            (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _start(job: Job) -> Any:
    """The network before its training; what Lite0 lacks of its class stays as it is."""
    if job.base is None:
        return small_vit(len(job.labels))
    cls: Any = EfficientNetForImageClassification if job.network == "lite0" else ViTForImageClassification
    model = cls.from_pretrained(
        job.base,
        num_labels=len(job.labels),
        id2label=dict(enumerate(job.labels)),
        label2id={label: number for number, label in enumerate(job.labels)},
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".squeeze_excite." not in name)
    return model


def _start_head(model: Any, pixels: Tensor, truth: Tensor, recipe: Recipe) -> None:
    """Set the head to a logistic regression on what it reads of the frozen network (see suites/text/train.py)."""
    from sklearn.linear_model import LogisticRegression

    seen: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()
    with torch.inference_mode():
        for part in torch.split(pixels, 64):
            model(pixel_values=part)
    hook.remove()
    probe = LogisticRegression(C=recipe.probe_strength, max_iter=300)
    probe.fit(torch.cat(seen).numpy(), truth.numpy())
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(probe.coef_))
        model.classifier.bias.copy_(torch.from_numpy(probe.intercept_))


def _fit(model: Any, pixels: Tensor, truth: Tensor, job: Job, order: random.Random, report: Report) -> None:
    recipe, head = job.recipe, model.classifier
    body = [value for value in model.base_model.parameters() if value.requires_grad]
    groups = [
        {"params": body, "lr": recipe.learning_rate},
        {"params": list(head.parameters()), "lr": recipe.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    warm_up_steps = max(1, round(recipe.warm_up * job.steps))

    def rate(step: int) -> float:
        return min((step + 1) / warm_up_steps, (job.steps - step) / max(1, job.steps - warm_up_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    step = 0
    for _ in range(recipe.epochs):
        shuffled = torch.tensor(order.sample(range(len(truth)), len(truth)))
        for rows in torch.split(shuffled, recipe.batch_size):
            loss = cross_entropy(model(pixel_values=pixels[rows]).logits, truth[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.largest_gradient_norm)
            optimizer.step()
            schedule.step()
            step += 1
            if step % REPORT_EVERY == 0 or step == job.steps:
                report(job.task, step, loss.item())
