"""How many rows a second does `twinmerge predict` answer, and does its memory depend on their number?

Expected: sorting a window by length and batching by tokens beats batches of a fixed size in the order of the file by
the share of padding in those (on rows of very different lengths, about 2 times), with the same answers; peak memory at
1,000,000 rows is that at 10,000, within 5 %.

Rows/s: a real twin, rows of all its tasks mixed; every contestant's answers are compared with those of rows answered
one by one before it is timed; contestants take turns; medians of ratios to fixed batches in the same turn. Memory: the
whole command on a twin of a tiny random BERT, peak of the resident set as the kernel tells it.

    python benchmarks/bench_predict.py --twin TWIN --rows test/*.jsonl [--count 512] [--threads 2] [--clock wall]
    python benchmarks/bench_predict.py --memory 10000 1000000
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import BertForSequenceClassification

from tests import tiny
from twinmerge.files.rows import Row, read_rows
from twinmerge.hf.batches import DEFAULTS, BatchLimits, batches
from twinmerge.hf.inputs import encode
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import WINDOW_ROWS, predict

SEED, FIXED = 0, 32
LIMITS = (BatchLimits(32, 2048), BatchLimits(64, 2048), DEFAULTS.limits, BatchLimits(64, 8192), BatchLimits(128, 8192))
Answers = list[dict[str, Any]]
Split = Callable[[Sequence[int]], list[list[int]]]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twin", type=Path, help="folder of a twin of classifiers")
    parser.add_argument("--rows", type=Path, nargs="+", help="JSON lines of all its tasks")
    parser.add_argument("--count", type=int, default=512, help="rows taken of all files together")
    parser.add_argument("--limits", type=limits_of, nargs="+", default=LIMITS, help="rows and tokens, such as 64x4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=11, help="0 counts tokens only")
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[], help="numbers of rows whose peak memory is measured"
    )
    options = parser.parse_args()
    if not options.twin and not options.memory:
        parser.error("give --twin and --rows, or --memory")
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    if options.twin:
        found["speed"] = speed(options)
    if options.memory:
        found["memory"] = memory(options.memory)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    about = {
        "benchmark": "predict",
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "threads": options.threads,
        "clock": options.clock,
        "repeats": options.repeats,
        "load": os.getloadavg()[0],
        "window_rows": WINDOW_ROWS,
        "seed": SEED,
    }
    print(json.dumps({**about, **found}))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Rows a second of `predict` at several limits, and of fixed batches in the order of the file."""
    model, rows = TwinModel.from_pretrained(options.twin), mixed(options.rows, options.count)
    splits: dict[str, Split] = {f"as they come, {FIXED} rows": in_order}
    for limits in options.limits:
        mark = " (default)" if limits == DEFAULTS.limits else ""
        splits[f"sorted, {limits.rows} rows, {limits.tokens} tokens{mark}"] = partial(batches, limits=limits)
    lengths = [len(one["input_ids"]) for one in encode(model, rows)]
    print(f"{len(rows)} rows, {sum(lengths)} tokens, {min(lengths)} to {max(lengths)} a row", flush=True)
    work = {name: computed(split(lengths), lengths) / sum(lengths) for name, split in splits.items()}
    for name, tokens in work.items():
        print(f"{name:42} {tokens:6.3f} tokens computed for a real one", flush=True)
    alone = [answer for row in rows for answer in predict(model, [row])] if options.repeats else []
    for name, split in splits.items() if options.repeats else ():
        require_same(name, answers(model, rows, split), alone)
        print(f"{name:42} answers as row by row", flush=True)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in splits}
    for _ in range(options.repeats):
        for name, split in splits.items():
            started = clock()
            answers(model, rows, split)
            seconds[name].append(clock() - started)
    figures = dict(summaries(seconds, len(rows))) if options.repeats else {}
    return {name: {"tokens_per_real_token": tokens, **figures.get(name, {})} for name, tokens in work.items()}


def in_order(lengths: Sequence[int]) -> list[list[int]]:
    """`FIXED` rows at a time, whatever their lengths."""
    return [list(range(start, min(start + FIXED, len(lengths)))) for start in range(0, len(lengths), FIXED)]


def computed(parts: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Tokens of all batches, padding included."""
    return sum(len(part) * max(lengths[index] for index in part) for part in parts)


def answers(model: TwinModel, rows: Sequence[Row], split: Split) -> Answers:
    """`predict` with its windows split into batches in another way."""
    with patch("twinmerge.jobs.predict.batches", lambda lengths, _: split(lengths)):
        return list(predict(model, rows))


def limits_of(text: str) -> BatchLimits:
    """Such as 64x4096: rows and tokens."""
    rows, tokens = map(int, text.split("x"))
    return BatchLimits(rows, tokens)


def mixed(files: Sequence[Path], count: int) -> list[Row]:
    """Texts of all files, drawn in a fixed order; fields that answers have are left out."""
    rows = [row for file in files for row in read_rows(file, labelled=False)]
    texts: list[Row] = [{key: row[key] for key in ("text", "text_pair") if key in row} for row in rows]
    return random.Random(SEED).sample(texts, min(count, len(texts)))


def require_same(name: str, found: Answers, expected: Answers) -> None:
    """Stop if an answer is not that of its row alone: labels exactly, numbers to what float32 sums differ by."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        numbers = [(one["score"], other["score"]), *zip(one["gate"].values(), other["gate"].values(), strict=True)]
        apart = max(abs(first - second) for first, second in numbers)
        if (one["expert"], one["label"]) != (other["expert"], other["label"]) or apart > 1e-3:
            raise SystemExit(f"{name}: row {number} is answered {one}, alone {other}")


def summaries(seconds: Mapping[str, list[float]], rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Print and give medians, and quartiles of the ratios to fixed batches in the same turn."""
    fixed = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratios = sorted(b / a for a, b in zip(times, fixed, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        one = {"rows_per_second": rows / statistics.median(times), "faster": statistics.median(ratios)}
        print(
            f"{name:42} {one['rows_per_second']:8.1f} rows/s  x{one['faster']:.2f} [{low:.2f} {high:.2f}]", flush=True
        )
        yield name, {**one, "quartiles": [low, high]}


def memory(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of the command on so many short rows, answered by a tiny twin."""
    found = []
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        family = tiny.make_family(root, tiny.bert(), BertForSequenceClassification)
        build(family.recipe(exclusive={"rank": 4}, router={"features": "tokens"}), root / "twin")
        for count in counts:
            write_rows(root / "rows.jsonl", count)
            found.append(peak(root, count))
            (root / "answers.jsonl").unlink()
    return found


def write_rows(path: Path, count: int) -> None:
    """Short texts of different lengths."""
    draw = random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = " ".join(f"w{draw.randrange(5, tiny.VOCABULARY)}" for _ in range(draw.randrange(1, 12)))
            file.write(json.dumps({"text": words, "id": number}) + "\n")


def peak(root: Path, count: int) -> dict[str, Any]:
    """Run the command; its peak memory, and that every row has its answer."""
    paths = ["--input", str(root / "rows.jsonl"), "--output", str(root / "answers.jsonl")]
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "twinmerge", "predict", str(root / "twin"), *paths], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    with (root / "answers.jsonl").open("rb") as file:
        ids = [json.loads(line)["id"] for line in file]
    if child.returncode or ids != list(range(count)):
        raise SystemExit(f"{count} rows: exit code {child.returncode}, {len(ids)} answers")
    one = {"rows": count, "peak_bytes": usage.ru_maxrss * 1024, "seconds": seconds}
    print(
        f"{count:>9,} rows: peak {one['peak_bytes'] / 1e6:7.1f} MB, {count / seconds:8.1f} rows/s whole command",
        flush=True,
    )
    return one


if __name__ == "__main__":
    main()
