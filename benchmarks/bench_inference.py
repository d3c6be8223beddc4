"""What does an exact mix of experts for every row cost, compared with one static model of the same shape?

Expected, as ratios to the static model: 1.12 for a mixed batch of 32 x 64 tokens on MiniLM (8 experts, rank 8, one used
a row) and the same within 3 % with 64 experts; 1.30 with 4 experts a row; 1.20 at batch 1 x 32; 1.20 with the routing;
1.12 for a decode step of a bf16 Llama at batch 16, 1.05 for 128 tokens at batch 1 and 1.15 for the first token,
routing included; the published way, a dense
rebuild for every sample, more than 20 times slower.

Every contestant's output is compared with the dense reference (`runtime/compose.py`) before it is timed, but for
PEFT's, which cannot mix. Contestants take turns; figures are medians of ratios to the static model in the same turn. On
a machine that others use, one thread and `--clock cpu` time the work alone. `plot_inference.py` draws the curves.

    python -m benchmarks.bench_inference --base MINILM [--suite text/seed0] [--threads 2] [--clock wall] [--repeats 11]
        [--cases single mixed fallback ways soft routed decode generate first curves] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.contestants import (
    DROP,
    EXPERTS,
    LAST,
    RANK,
    SEED,
    Encoder,
    Inputs,
    check_llama,
    group_wise,
    llama,
    one_expert_gates,
    peft_rows,
    peft_xlora,
    published,
    quiet_peft,
    random_inputs,
    separate_models,
    soft_gates,
    some_rows,
    untrained_router,
)
from benchmarks.roofline import machine, total_work
from twinmerge.files.rows import read_rows
from twinmerge.hf.loading import load_backbone, load_tokenizer
from twinmerge.hf.model import TwinModel
from twinmerge.hf.router_data import EncodedRows
from twinmerge.routing.combined import assemble
from twinmerge.routing.fit import fit_router
from twinmerge.routing.router import Router, Stored
from twinmerge.runtime.gate import keep_large
from twinmerge.twin.features import Features
from twinmerge.twin.recipe import RouterSettings

Contestants = Mapping[str, Callable[[], Any]]
SLOW = "encoder.layer.0.attention.self.query.bias"
"""The parameter that goes by the fall-back in its case."""


@dataclass(frozen=True)
class Options:
    """Of the command."""

    base: Path
    suite: Path | None
    repeats: int
    clock: Callable[[], float]


# ---- time


def turns(contestants: Contestants, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every contestant in every turn, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for run in contestants.values():
            run()
        for _ in range(repeats):
            for name, run in contestants.items():
                started = clock()
                run()
                seconds[name].append(clock() - started)
    return seconds


def summary(case: str, contestants: Contestants, options: Options, repeats: int | None = None) -> dict[str, Any]:
    """Time, print and return medians of the ratios to the static model in the same turn."""
    seconds = turns(contestants, repeats or options.repeats, options.clock)
    found = {}
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["static"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        median = statistics.median(times)
        found[name] = {"ms": 1e3 * median, "ratio": statistics.median(ratios), "quartiles": [low, high]}
        print(
            f"{case:14} {name:34} {1e3 * median:9.2f} ms  x{found[name]['ratio']:.3f}  [{low:.3f} {high:.3f}]",
            flush=True,
        )
    return found


# ---- cases


def single_case(options: Options) -> dict[str, Any]:
    """One row of 32 tokens: by factors, and by merged weights once its gate is known."""
    ours, other, inputs = Encoder(options.base), Encoder(options.base), random_inputs(1, 32)
    gates = keep_large(one_expert_gates(1, EXPERTS), DROP)
    runs = {
        "twin, a gate never met": ours.in_mode("auto", gates, inputs, forget=True),
        "twin, a gate met before": other.in_mode("merge", gates, inputs),
    }
    error = max(ours.check(run(), gates, inputs) for run in runs.values())
    found = summary("single", {"static": lambda: ours.static(**inputs), **runs}, options)
    return {**found, "largest_difference": error, "memory_ratio": ours.memory_ratio()}


def mixed_case(options: Options) -> dict[str, Any]:
    """32 rows of 64 tokens, one expert used a row, of 8 and of 64."""
    ours, many, inputs = Encoder(options.base), Encoder(options.base, 64), random_inputs(32, 64)
    gates, wide = (keep_large(one_expert_gates(32, count), DROP) for count in (EXPERTS, 64))
    runs, error = ours.modes(gates, inputs, "auto", "all", "gather")
    more, other_error = many.modes(wide, inputs, "auto")
    runs["twin, auto, 64 experts"] = more["twin, auto"]
    found = summary("mixed", {"static": lambda: ours.static(**inputs), **runs}, options)
    memory = ours.memory_ratio()
    print(f"mixed          memory of the loaded twin x{memory:.3f} of one model")
    return {**found, "largest_difference": max(error, other_error), "memory_ratio": memory}


def fallback_case(options: Options) -> dict[str, Any]:
    """32 rows of 64 tokens under 1 to 8 hard gates, where one parameter has no fast layer: a pass a distinct gate."""
    ours, inputs = Encoder(options.base), random_inputs(32, 64)
    slow = TwinModel(load_backbone(options.base), ours.exclusive, fallback=[SLOW])
    runs: dict[str, Callable[[], Any]] = {}
    error = 0.0
    for count in (1, 2, 4, 8):
        gates = torch.eye(EXPERTS)[torch.arange(32) % count]
        runs[f"all fast, {count} gates"] = ours.in_mode("auto", gates, inputs)
        runs[f"fall-back, {count} gates"] = partial(slow.encode, gates, mode="auto", **inputs)
        error = max(error, ours.check(slow.encode(gates, **inputs)[0], gates, inputs))
    found = summary("fallback", {"static": lambda: ours.static(**inputs), **runs}, options)
    return {**found, "largest_difference": error}


def ways_case(options: Options) -> dict[str, Any]:
    """The same batch by other means, and a single sample the published way."""
    ours, inputs = Encoder(options.base), random_inputs(32, 64)
    whole = one_expert_gates(32, EXPERTS)
    gates = keep_large(whole, DROP)
    runs, error = ours.modes(gates, inputs, "auto", "merge")
    adapters, names = peft_rows(ours.static, gates.argmax(dim=1).tolist())
    router = untrained_router(EXPERTS, ours.static.config.hidden_size)
    one = some_rows(inputs, 0)
    by_publication = published(ours, router, one)
    with torch.inference_mode():
        gate = router.route(Stored({LAST: ours.static(**one)[0].mean(dim=1)})).gate
        error = max(error, ours.check(by_publication(), gate, one))
    with tempfile.TemporaryDirectory() as folder, quiet_peft():
        mixture = peft_xlora(ours.static, Path(folder))
        contestants: dict[str, Callable[[], Any]] = {
            "static": lambda: ours.static(**inputs),
            **runs,
            "group-wise, merged for the batch": group_wise(ours, whole, inputs),
            "8 separate models": separate_models(ours, gates, inputs),
            "PEFT, one adapter a row": lambda: adapters(**inputs, adapter_names=names),
            "PEFT, X-LoRA": lambda: mixture(**inputs),
            "published, ONE sample": by_publication,
        }
        found = summary("ways", contestants, options)
    faster = 32 * found["published, ONE sample"]["ms"] / found["twin, auto"]["ms"]
    print(f"ways           a sample the published way takes {faster:.1f} times as long as a row of the batch")
    return {**found, "largest_difference": error, "faster_than_published": faster}


def soft_case(options: Options) -> dict[str, Any]:
    """32 rows of 64 tokens, four of eight experts in each."""
    ours, inputs = Encoder(options.base), random_inputs(32, 64)
    runs, error = ours.modes(soft_gates(32, EXPERTS), inputs, "auto", "all", "gather")
    found = summary("soft", {"static": lambda: ours.static(**inputs), **runs}, options)
    return {**found, "largest_difference": error}


ROUTERS: Mapping[str, dict[str, Any]] = {
    "token router": {"features": "tokens"},
    "cascade": {"features": "cascade"},
    "speculative": {"features": "speculative", "gate": "hard"},
    "two passes, all layers and tokens": {"features": "all+tokens"},
}


def routed_case(options: Options) -> dict[str, Any]:
    """The text suite's rows, 4 of each of its 8 tasks, cut and padded to 64 tokens; routing included."""
    if options.suite is None:
        raise SystemExit("the case 'routed' needs --suite, a seed's folder of the text suite")
    ours = Encoder(options.base)
    ours.twin.tokenizer, ours.twin.max_length = load_tokenizer(options.base), 64
    tasks = sorted(path.name.removesuffix(".router.jsonl") for path in (options.suite / "data").glob("*.router.jsonl"))
    rows = {
        name: read_rows(options.suite / "data" / f"{task}.router.jsonl", labelled=False)[:200]
        for name, task in zip(ours.twin.expert_names, tasks, strict=True)
    }
    owners = [name for name, own in rows.items() for _ in own]
    data = EncodedRows.of(ours.twin, [row for own in rows.values() for row in own])
    texts = [
        row["text"]
        for task in tasks
        for row in read_rows(options.suite / "data" / f"{task}.test.jsonl", labelled=True)[:4]
    ]
    encoded = ours.twin.tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    contestants: dict[str, Callable[[], Any]] = {"static": lambda: ours.static(**inputs)}
    error, second_look = 0.0, 0.0
    for title, given in ROUTERS.items():
        settings = RouterSettings(**given)
        router = fit_router(data, owners, settings, seed=SEED)
        second_look = router.report.get("second_look", second_look)
        contestants[f"twin, {title}"] = run = routed(ours.twin, router, inputs)
        gates, states = run()
        error = max(error, ours.check(states, gates, inputs))
    contestants["twin, gates given"] = ours.in_mode("auto", gates, inputs)
    found = summary("routed", contestants, options)
    print(f"routed         of the cascade's held-out inputs {second_look:.1%} took a second look")
    return {**found, "largest_difference": error, "second_look": second_look}


def routed(twin: TwinModel, router: Router, inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """Route and answer; gives gates and states."""

    def run() -> tuple[Tensor, Tensor]:
        twin.router = router
        found = twin(**inputs)
        assert found.last_hidden_state is not None
        return found.gate, found.last_hidden_state

    return run


def decode_case(options: Options) -> dict[str, Any]:
    """One step at batch 16 on a cache of 128 tokens, one of eight experts a row."""
    static, twin, exclusive = llama()
    gates = torch.eye(EXPERTS)[torch.arange(16) % EXPERTS]
    prompt, step = torch.randint(0, 32000, (16, 128)), torch.randint(0, 32000, (16, 1))
    adapters, names = peft_rows(static, [index % EXPERTS for index in range(16)])

    def cached(model: Any, **settings: Any) -> Callable[[], Tensor]:
        cache = DynamicCache(config=static.config)
        with torch.inference_mode():
            model(input_ids=prompt, past_key_values=cache, **settings)

        def run() -> Tensor:
            cache.crop(-1) if cache.get_seq_length() > 128 else None
            logits: Tensor = model(input_ids=step, past_key_values=cache, **settings).logits
            return logits

        return run

    with torch.inference_mode():
        context = twin.twin.context(gates, 16, 128)
        with twin.twin.slot.use(context):
            run_twin = cached(twin.backbone)
            found = run_twin()[0, -1]
    error = check_llama(static, exclusive, gates[0], found, torch.cat([prompt[:1], step[:1]], dim=1))

    def run_ours() -> None:
        with twin.twin.slot.use(context):
            run_twin()

    contestants = {
        "static": cached(static),
        "twin, auto": run_ours,
        "PEFT, one adapter a row": cached(adapters, adapter_names=names),
    }
    return {**summary("decode", contestants, options), "largest_difference": error}


def generate_case(options: Options) -> dict[str, Any]:
    """128 tokens at batch 1 after a prompt of 32: a gate never met, whose weights are merged, and one met before."""
    static, twin, exclusive = llama()
    prompt = random_inputs(1, 32)
    gates = keep_large(one_expert_gates(1, EXPERTS), DROP)
    settings = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}
    written: dict[str, Any] = {**prompt, **settings}

    def fresh() -> Tensor:
        twin.merged.clear()
        return known()

    def known() -> Tensor:
        tokens: Tensor = twin.generate(gate=gates, **written)
        return tokens

    fresh()
    logits = twin(gate=gates, **prompt).logits[0, -1]
    error = check_llama(static, exclusive, gates[0], logits, prompt["input_ids"])
    contestants = {
        "static": lambda: static.generate(**written),
        "twin, a gate never met": fresh,
        "twin, a gate met before": known,
    }
    repeats = min(5, options.repeats)
    return {**summary("generate", contestants, options, repeats), "largest_difference": error, "repeats": repeats}


def first_case(options: Options) -> dict[str, Any]:
    """The first token after a prompt of 32 at batch 1, routing included: the prefill checks the router's guess."""
    static, twin, exclusive = llama()
    layers, size = static.config.num_hidden_layers + 1, static.config.hidden_size
    names = list(exclusive)
    settings = RouterSettings(features=Features.parse("speculative"), gate="hard")
    router: Any = assemble(names, settings, feature_size=layers * size, ngrams=20_000)
    known = router.scorer.tokens.ngrams  # all scores are equal, so that its guess is right; what it knows costs time
    known.keys, known.idf = torch.arange(20_000), torch.ones(20_000)
    twin.router = router.eval()
    written: dict[str, Any] = {**random_inputs(1, 32), "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    found, routing = twin.generate_routed(**written)
    assert routing is not None
    assert len(found) == 1
    logits = twin(gate=routing.gate, **random_inputs(1, 32)).logits[0, -1]
    error = check_llama(static, exclusive, routing.gate[0], logits, written["input_ids"])
    contestants = {
        "static": lambda: static.generate(**written),
        "twin, routing included": lambda: twin.generate(**written),
        "twin, gate given": lambda: twin.generate(gate=routing.gate, **written),
    }
    return {**summary("first", contestants, options), "largest_difference": error}


# ---- curves and roofline

CURVES: Mapping[str, tuple[int, ...]] = {
    "experts": (1, 8, 64, 256),
    "rank": (1, 4, 8, 16, 64),
    "batch": (1, 4, 16, 32, 128),
    "length": (16, 64, 256, 512),
}


def curves_case(options: Options) -> dict[str, Any]:
    """The ratio over one number at a time; else 8 experts, rank 8, 32 rows of 64 tokens, 8 rows where length varies."""
    peak, bandwidth = machine(options.clock)
    print(f"curves         measured peak {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    found: dict[str, Any] = {"peak_flops": peak, "bandwidth_bytes": bandwidth}
    for name, values in CURVES.items():
        found[name] = [{"value": value, **point(name, value, peak, bandwidth, options)} for value in values]
    return found


def point(name: str, value: int, peak: float, bandwidth: float, options: Options) -> dict[str, Any]:
    """One place on a curve: measured, counted, and what the machine's peaks allow."""
    sizes = {"experts": EXPERTS, "rank": RANK, "batch": 8 if name == "length" else 32, "length": 64, name: value}
    ours, inputs = (
        Encoder(options.base, sizes["experts"], sizes["rank"]),
        random_inputs(sizes["batch"], sizes["length"]),
    )
    ours.twin.merged.limit_bytes = 0  # factors, at batch 1 too
    gates = keep_large(one_expert_gates(sizes["batch"], sizes["experts"]), DROP)
    runs, _ = ours.modes(gates, inputs, "auto")
    contestants = {"static": lambda: ours.static(**inputs), **runs}
    timed = summary(f"{name} {value}", contestants, options, min(7, options.repeats))
    work = {who: total_work(ours, who == "twin", sizes) for who in ("static", "twin")}
    bound = {who: sum(max(f / peak, b / bandwidth) for f, b in steps) for who, steps in work.items()}
    return {
        "ratio": timed["twin, auto"]["ratio"],
        "quartiles": timed["twin, auto"]["quartiles"],
        "ms": {"static": timed["static"]["ms"], "twin": timed["twin, auto"]["ms"]},
        "flops": {who: sum(f for f, _ in steps) for who, steps in work.items()},
        "bytes": {who: sum(b for _, b in steps) for who, steps in work.items()},
        "bound_ms": {who: 1e3 * seconds for who, seconds in bound.items()},
        "bound_ratio": bound["twin"] / bound["static"],
    }


CASES: Mapping[str, Callable[[Options], dict[str, Any]]] = {
    "single": single_case,
    "mixed": mixed_case,
    "fallback": fallback_case,
    "ways": ways_case,
    "soft": soft_case,
    "routed": routed_case,
    "decode": decode_case,
    "generate": generate_case,
    "first": first_case,
    "curves": curves_case,
}


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a MiniLM (BERT) model")
    parser.add_argument("--suite", type=Path, help="a seed's folder of the text suite, for the case 'routed'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="file for the results, beside the last line")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    options = Options(given.base, given.suite, given.repeats, clock)
    results = {case: CASES[case](options) for case in given.cases}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    record = {
        "benchmark": "inference",
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "threads": given.threads,
        "clock": given.clock,
        "repeats": given.repeats,
        "dtype": {"encoder": "float32", "decode": "bfloat16", "generate": "bfloat16"},
        "rank": RANK,
        "seed": SEED,
        "results": results,
    }
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
