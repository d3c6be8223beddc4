"""What does kill -9 leave of a build and of a merge? Expected: no wrong model at any moment, and the same bits resumed.

    python benchmarks/check_crashes.py --work /tmp/crashes [--times 20] [--base FOLDER]

Each command runs undisturbed once; then again and again, killed at a random moment between its start and a tenth past
its usual end. A folder that is there after the kill must be complete; `--resume` must give the undisturbed run's bytes
and leave nothing beside them. `--overwrite` has an older result in the place: the name must hold one or the other.
Experts are the base plus noise; without --base it is a random BERT of four layers. Linux: a process that has imported
everything is forked for each run, so that the moments fall into the work and not into the imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from twinmerge.cli import main as program
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.hashes import sha256_of
from twinmerge.files.writer import copy_side_files, save_tensors
from twinmerge.twin.artifact import TwinArtifact

EXPERTS = ("a", "b", "c")
MANIFESTS = {"build": "twin.json", "merge": "merge.json"}


def main() -> None:
    """Make experts, kill, resume, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--times", type=int, default=20, help="kills of each command")
    parser.add_argument("--base", type=Path, help="folder of an encoder and its tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--executor", default="threads", choices=("serial", "threads", "processes"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no threads of its parent's pool
    options.work.mkdir(parents=True)
    base = options.base.expanduser().resolve() if options.base else random_bert(options.work / "base")
    recipes = write_inputs(options.work, base)
    for module in ("peft", "sklearn.linear_model", "transformers", "twinmerge.jobs.build", "twinmerge.jobs.merge"):
        import_module(module)
    results = {}
    for name, command, overwrite in (("build", "build", False), ("merge", "merge", False), ("over", "merge", True)):
        out = options.work / name
        results[name] = torment([command, str(recipes[command])], out, overwrite, options)
        title = f"{command} {'--overwrite' if overwrite else ''}".strip()
        print(f"{title}: {', '.join(f'{count} {what}' for what, count in results[name].items())}")
    bad = sum(result["wrong"] for result in results.values())
    print(json.dumps({"check": "crashes", "base": str(base), "seed": options.seed, "results": results}))
    sys.exit(1 if bad else 0)


def torment(command: list[str], out: Path, overwrite: bool, options: argparse.Namespace) -> dict[str, int]:
    """Kill a command again and again; how the runs were found, and how many were wrong."""
    arguments = [*command, "--out", str(out), "--executor", options.executor]
    older = None
    if overwrite:
        run([command[0], str(options.work / "older.yaml"), "--out", str(out)])
        older = digests(out)
        arguments.append("--overwrite")
    start = time.perf_counter()
    run(arguments)
    length = time.perf_counter() - start
    calm = digests(out)
    moments = random.Random(options.seed)
    found: Counter[str] = Counter(dict.fromkeys(("killed at work", "killed before", "complete", "wrong"), 0))
    for _ in range(options.times):
        if older is None:
            shutil.rmtree(out)
        else:
            run([command[0], str(options.work / "older.yaml"), "--out", str(out), "--overwrite"])
        run(arguments, kill_after=moments.uniform(0, 1.1 * length))
        left = out.with_name(f".{out.name}.partial").exists()
        there = digests(out) if out.exists() else older
        if older is not None and not out.exists():
            found["wrong"] += 1  # the older result is gone
        complete = out.exists() and there == calm
        found["complete" if complete else "killed at work" if left else "killed before"] += 1
        if not complete:
            wrong = out.exists() and there != older
            run([*arguments, "--resume"])
            found["wrong"] += wrong or digests(out) != calm
        beside = [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]
        found["wrong"] += bool(beside) and not complete
    return dict(found)


def run(arguments: list[str], kill_after: float | None = None) -> None:
    """The program in a fork of this process, killed after so many seconds if it is not done by then."""
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if kill_after is not None:
            os.setpgid(0, 0)
        os._exit(program(arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0 and kill_after is None:
        raise SystemExit(f"{' '.join(arguments)} ended with {status}")


def digests(folder: Path) -> dict[str, Any]:
    """The hash of every file; of the manifest its content, all but the times. A folder that does not load ends this."""
    if (folder / MANIFESTS["build"]).exists():
        TwinArtifact.open(folder).verify()
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.specs:
        checkpoint.read(name)
    found: dict[str, Any] = {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*") if p.is_file()}
    for name in set(MANIFESTS.values()) & set(found):
        found[name] = json.loads((folder / name).read_text())
        del found[name]["created"]
    return found


def write_inputs(work: Path, base: Path) -> dict[str, Path]:
    """Experts, the router's rows and recipes, by command; one recipe more for an older result."""
    checkpoint = Checkpoint.open(base)
    words = [f"word{number}" for number in range(60)]
    for place, name in enumerate(EXPERTS):
        (work / name).mkdir()
        copy_side_files(base, work / name)
        generator = torch.Generator().manual_seed(place)
        tensors = {n: checkpoint.read(n) for n in checkpoint.specs}
        save_tensors({n: with_noise(t, generator) for n, t in tensors.items()}, work / name / "model.safetensors")
        rows = [{"text": " ".join(words[(20 * place + i * j) % 60] for j in range(2, 8))} for i in range(24)]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    twin = "".join(f"  {name}: {{model: {name}, router_data: {name}.jsonl}}\n" for name in EXPERTS)
    static = "".join(f"  {name}: {name}\n" for name in EXPERTS)
    recipes = {
        "build": f"base: {base}\nexperts:\n{twin}shared: {{method: ties}}\nexclusive: {{budget: 0.5}}\n",
        "merge": f"base: {base}\nexperts:\n{static}shared: {{method: dare_ties}}\n",
        "older": f"base: {base}\nexperts:\n{static}shared: {{method: average}}\n",
    }
    for name, text in recipes.items():
        (work / f"{name}.yaml").write_text(text)
    return {name: work / f"{name}.yaml" for name in recipes}


def with_noise(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A fine-tune's tensor; integers are buffers and stay."""
    if not tensor.is_floating_point():
        return tensor
    return tensor + (0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def random_bert(folder: Path) -> Path:
    """An encoder of four layers with a tokenizer of the words that the router's rows use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"word{number}": number + 2 for number in range(60)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast  # it has no types
    make(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder.resolve()


if __name__ == "__main__":
    main()
