"""How well is an input noticed that belongs to no expert?

Expected: text in no known language stands out by any measure; a fifth task in the same language as four does not, or
hardly: its inputs are near some expert's, and its answers may well be useful. The detector of a twin's router
(router.detector) decides which inputs are left to the shared expert.

Own rows are test rows of the twin's tasks; alien are rows of unseen tasks and five kinds of foreign input, made here
from a fixed seed. For every detector the AUROC, own against alien; for the router's own detector the share of alien
rows that it would catch if 5 % of own rows may be lost; and what falls back at the twin's threshold. Nothing is chosen
on these rows.

    python benchmarks/bench_detectors.py --twin TWIN --own data/*.test.jsonl --unseen unseen/*.test.jsonl [--rows 300]
"""

import argparse
import json
import random
import statistics
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor

from twinmerge.files.rows import read_rows
from twinmerge.hf.batches import DEFAULTS
from twinmerge.hf.features import Looked
from twinmerge.hf.inputs import batches_of, encode, pad
from twinmerge.hf.model import TwinModel
from twinmerge.routing.combined import Sum

SEED = 0
ROUTERS = "the router's"
MAY_BE_LOST = 0.05
SCRIPTS = {"Greek": (0x3B1, 0x3C9), "Cyrillic": (0x430, 0x44F), "Hangul": (0xAC00, 0xAF00), "Arabic": (0x627, 0x64A)}


def foreign(own: Sequence[str], count: int) -> dict[str, list[str]]:
    """Five kinds of input in no language that an expert knows."""
    draw = random.Random(SEED)

    def script(_: int) -> str:
        low, high = draw.choice(list(SCRIPTS.values()))
        return " ".join("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(2, 9))) for _ in range(12))

    def shuffled(_: int) -> str:
        letters = list(draw.choice(own)[:200])
        draw.shuffle(letters)
        return "".join(letters)

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = [line.strip() for file in files[:60] for line in file.read_text(errors="ignore").splitlines()]
    code = [line for line in lines if len(line) > 30 and not line.startswith("#")]
    words = [word for text in own[:50] for word in text.split()]
    return {
        "hex strings": [draw.randbytes(draw.randint(8, 40)).hex() for _ in range(count)],
        "other scripts": [script(i) for i in range(count)],
        "shuffled letters": [shuffled(i) for i in range(count)],
        "lines of code": draw.sample(code, count),
        "one word, repeated": [" ".join([draw.choice(words)] * draw.randint(5, 30)) for _ in range(count)],
    }


@torch.inference_mode()
def scores(model: TwinModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """(row,) of each detector, more for what is stranger; `fallback` is what the twin does."""
    router = model.router
    assert router is not None
    encoded = encode(model, [{"text": text} for text in texts])
    found: dict[str, Tensor] = {}
    for chosen in batches_of(model, encoded, DEFAULTS.limits):
        looked = Looked(model.features_as, pad(model, [encoded[index] for index in chosen]))
        logits, distance = router.look(looked)
        probability = (logits / router.temperature).softmax(dim=1)
        one = {
            "distance": distance,
            "energy": -(logits / router.temperature).logsumexp(dim=1),
            "uncertainty": 1 - probability.amax(dim=1),
            ROUTERS: router.strangeness(logits, distance),
            "fallback": (router.strangeness(logits, distance) > router.fallback_distance).float(),
        }
        if isinstance(router.scorer, Sum):
            tokens, unknown = router.scorer.tokens.score(looked)
            one["unknown n-grams"] = unknown
            one["disagreement"] = (tokens.softmax(dim=1) - probability).abs().sum(dim=1) / 2
        for name, values in one.items():
            found.setdefault(name, torch.zeros(len(texts)))[chosen] = values.float().cpu()
    return found


def main() -> None:
    """Score all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twin", type=Path, required=True)
    parser.add_argument("--own", type=Path, nargs="+", required=True, help="JSON lines of the twin's tasks")
    parser.add_argument("--unseen", type=Path, nargs="*", default=[], help="JSON lines of other tasks")
    parser.add_argument("--rows", type=int, default=300, help="of each file and kind, the first")
    parser.add_argument("--json", type=Path, help="write the table there too")
    options = parser.parse_args()

    def texts(path: Path) -> list[str]:
        return [row["text"] for row in read_rows(path, labelled=False)[: options.rows]]

    model = TwinModel.from_pretrained(options.twin)
    own = [text for path in options.own for text in texts(path)]
    kinds = {path.name.split(".")[0]: texts(path) for path in options.unseen} | foreign(own, options.rows)
    known = scores(model, own)
    table = Table("alien input", *(name for name in known if name != "fallback"), "caught", "falls back")
    rows = []
    for kind, alien in kinds.items():
        found = scores(model, alien)
        truth = [0] * len(own) + [1] * len(alien)
        auroc = {
            name: float(roc_auc_score(truth, torch.cat([known[name], values])))
            for name, values in found.items()
            if name != "fallback"
        }
        lost = float(found["fallback"].mean())
        caught = float((found[ROUTERS] > known[ROUTERS].quantile(1 - MAY_BE_LOST)).float().mean())
        rows.append({"kind": kind, "auroc": auroc, "caught": caught, "fallback": lost})
        table.add_row(kind, *(f"{100 * value:.1f}" for value in auroc.values()), f"{caught:.1%}", f"{lost:.1%}")
    means = {name: statistics.fmean(row["auroc"][name] for row in rows) for name in rows[0]["auroc"]}
    table.add_row("mean", *(f"{100 * value:.1f}" for value in means.values()), "", "")
    table.add_row("own rows", *[""] * len(means), f"{MAY_BE_LOST:.1%}", f"{float(known['fallback'].mean()):.2%}")
    Console(width=150).print(table)
    if options.json:
        own_share = float(known["fallback"].mean())
        options.json.write_text(json.dumps({"kinds": rows, "mean": means, "own": own_share}, indent=1) + "\n")


if __name__ == "__main__":
    main()
