"""Walks transformers' own auto-class mappings and says how a twin of each class is served.

    python -m tests.walk [--kinds causal classifier ...] [--only NAME ...] [--out walk.jsonl] [--workers 2]

Every class of which a tiny model can be made is a base with two experts, merged and decomposed at full rank; a batch
of different gates is then compared with the experts, with each row alone, and with merged weights. Ends with 1 if any
class is served wrongly.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tests.walk.laws import Outcome, quiet_worker, walk_class
from tests.walk.small import KINDS, classes


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    parser.add_argument("--only", nargs="+", help="these classes")
    parser.add_argument("--out", type=Path, help="one JSON line a class")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    wanted = sorted({(kind, name) for kind in options.kinds for name in classes(kind).values()})
    wanted = [pair for pair in wanted if options.only is None or pair[1] in options.only]
    found: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.workers, context, quiet_worker) as pool:
        jobs = [pool.submit(walk_class, kind, name, Path(folder) / f"{kind}-{name}") for kind, name in wanted]
        names = dict(zip(jobs, wanted, strict=True))
        for count, job in enumerate(as_completed(jobs), start=1):
            outcome = _outcome(job, *names[job])
            found.append(outcome)
            if outcome.way != "fast":
                _say(f"[{count}/{len(jobs)}] {outcome.kind} {outcome.name}: {outcome.way} {outcome.reason[:160]}")
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
    _table(found)
    return int(any(outcome.way == "wrong" for outcome in found))


def _outcome(job: object, kind: str, name: str) -> Outcome:
    try:
        return job.result()  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001  # a class that breaks the runtime is a finding, not the walk's end
        return Outcome(kind, name, "wrong", reason=f"{type(error).__name__}: {str(error)[:200]}")


def _table(found: list[Outcome]) -> None:
    ways = ("fast", "partly", "refused", "wrong", "not made")
    _say(f"\n{'kind':<12}" + "".join(f"{way:>10}" for way in ways))
    for kind in KINDS:
        counts = Counter(outcome.way for outcome in found if outcome.kind == kind)
        _say(f"{kind:<12}" + "".join(f"{counts[way]:>10}" for way in ways))
    total = Counter(outcome.way for outcome in found)
    _say(f"{'all':<12}" + "".join(f"{total[way]:>10}" for way in ways))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
