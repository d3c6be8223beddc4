"""Does a twin of full rank give every real expert back? Expected: logits equal to 1e-4 on every test row tried.

    python benchmarks/check_reconstruction.py [--suite suites/text/text8.yaml] [--seed 0] [--rows 100]

Builds the suite's experts at full rank with exclusive embeddings, and compares the logits under one-hot gates with
those of the expert's own model, loaded by transformers.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from twinmerge.eval.seed import ANY_ROUTER, SeedRun
from twinmerge.eval.suite import Suite
from twinmerge.files.progress import silent
from twinmerge.hf.inputs import tokenize
from twinmerge.twin.recipe import ExclusiveSettings


def main() -> None:
    """Build at full rank, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, default=Path("suites/text/text8.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=100, help="test rows of each task")
    options = parser.parse_args()
    at = SeedRun(Suite.load(options.suite), options.seed, silent)
    model = at.build(at.suite.shared, ExclusiveSettings(rank=10**6, embeddings="exclusive"), ANY_ROUTER).model
    worst = {}
    for name, task in at.tasks.items():
        inputs = tokenize(model, task.test[: options.rows])
        ours = torch.stack(model(**inputs, expert=name).logits)
        with torch.inference_mode():
            path = at.plan.experts[name].checkpoint.path
            expected = AutoModelForSequenceClassification.from_pretrained(path)(**inputs).logits
        worst[name] = float((ours - expected).abs().max())
        sys.stdout.write(f"{name}: largest difference of {expected.numel():,} logits {worst[name]:.2e}\n")
    verdict = max(worst.values()) <= 1e-4
    sys.stdout.write(json.dumps({"check": "reconstruction", "worst": worst, "within_1e-4": verdict}) + "\n")
    sys.exit(0 if verdict else 1)


if __name__ == "__main__":
    main()
