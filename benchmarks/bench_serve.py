"""What does a gate of its own for every request cost a server, compared with one static model and one at a time?

Expected: 16 requests under 16 mixed gates at once give the greedy texts of 16 materialised models, 3 times the tokens a
second of one request at a time or more, and 0.9 of the static shared expert's on the same server or more.

Everything goes over HTTP at 127.0.0.1. Texts are compared before anything is timed. Contestants take turns; figures
are medians of ratios within a turn, so that other work on the machine slows all alike. Without `--twin` a model stands
in whose experts are random pairs of low rank in every linear layer: `--base`, or a Llama of SmolLM2's shape (135M) with
random weights.

    python -m benchmarks.bench_serve [--twin FOLDER | --base FOLDER] [--prompts FILE] [--requests 16] [--tokens 32]
        [--repeats 5] [--experts 7] [--rank 16] [--pairs 0] [--threads 2] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twinmerge.hf.loading import load_backbone, load_tokenizer
from twinmerge.hf.model import TwinModel
from twinmerge.serve.app import make_app
from twinmerge.serve.client import Client
from twinmerge.serve.engine import Engine
from twinmerge.serve.metrics import Metrics
from twinmerge.serve.server import listen
from twinmerge.serve.settings import ServeSettings
from twinmerge.tensors.low_rank import LowRank

SEED = 0
Body = Mapping[str, Any]


def main() -> None:
    """Compare texts, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twin", type=Path, help="folder of a twin that writes texts")
    parser.add_argument("--base", type=Path, help="folder of the stand-in's base")
    parser.add_argument("--prompts", type=Path, help="JSON lines with text or prompt")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of every text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experts", type=int, default=7, help="of the stand-in")
    parser.add_argument("--rank", type=int, default=16, help="of the stand-in")
    parser.add_argument("--layers", type=int, default=30, help="of the stand-in")
    parser.add_argument("--pairs", type=int, default=0, help="prompts asked under two gates at once, none may cross")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the results, beside the last line")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = stand_in(given) if given.twin is None else TwinModel.from_pretrained(given.twin)
    prompts = written(given.prompts, given.requests) if given.prompts else made_up(model, given.requests)
    gates = mixed(len(model.expert_names), given.requests)
    with served(model, given.requests) as client:
        results = compared(client, model, prompts, gates, given)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    record = {
        "benchmark": "serve",
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "starlette", "uvicorn")},
        "threads": given.threads,
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "twin": str((given.twin or given.base or Path("random")).name),
        "experts": len(model.expert_names),
        "requests": given.requests,
        "tokens": given.tokens,
        "repeats": given.repeats,
        "seed": SEED,
        "results": results,
    }
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


def compared(
    client: Client, model: TwinModel, prompts: Sequence[str], gates: torch.Tensor, given: argparse.Namespace
) -> dict[str, Any]:
    """Texts against those of materialised models, then times."""
    fixed = {"model": "twin", "max_tokens": given.tokens, "temperature": 0}
    named = [dict(zip(model.expert_names, row, strict=True)) for row in gates.tolist()]
    own = [{**fixed, "prompt": p, "twin": {"gate": g}} for p, g in zip(prompts, named, strict=True)]
    static = [{**fixed, "model": "twin:shared", "prompt": prompt} for prompt in prompts]
    texts = together(client, own)
    same = [said(text) == alone(model, p, g, given.tokens) for text, p, g in zip(texts, prompts, gates, strict=True)]
    print(f"texts of materialised models: {sum(same)} of {len(same)}")
    crossed = pairs(client, own, named, given.pairs)
    ways: dict[str, Callable[[], int]] = {
        "own gates": lambda: count(together(client, own)),
        "shared expert": lambda: count(together(client, static)),
        "one at a time": lambda: count([client.ask("/v1/completions", body) for body in own]),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, run in ways.items():
            began = time.perf_counter()
            speeds[name].append(run() / (time.perf_counter() - began))
    ours = speeds["own gates"]
    ratios = {
        f"own gates / {other}": statistics.median(a / b for a, b in zip(ours, speeds[other], strict=True))
        for other in ("shared expert", "one at a time")
    }
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, speed in medians.items():
        print(f"{name:16} {speed:8.1f} tokens/s")
    for name, ratio in ratios.items():
        print(f"{name:32} {ratio:.2f}")
    return {
        "same_texts": sum(same),
        "pairs": given.pairs,
        "crossed": crossed,
        "tokens_per_s": medians,
        "ratios": ratios,
    }


def pairs(client: Client, own: Sequence[Body], named: Sequence[Mapping[str, float]], number: int) -> int:
    """How many of so many prompts, each asked under two gates at once, got another text than under that gate alone."""
    if not number:
        return 0
    short = [{**body, "max_tokens": 4} for body in own]
    asked = [{**body, "twin": {"gate": gate}} for body in short for gate in (named[0], named[1])]
    expected = [said(client.ask("/v1/completions", body)) for body in asked]
    order = [index % len(asked) for index in range(2 * number)]
    found = together(client, [asked[index] for index in order], workers=len(own))
    crossed = sum(said(text) != expected[index] for text, index in zip(found, order, strict=True))
    print(f"{number} prompts under two gates: {crossed} texts crossed")
    return crossed


def together(client: Client, bodies: Sequence[Body], workers: int | None = None) -> list[dict[str, Any]]:
    """All answers, asked for at once."""
    with ThreadPoolExecutor(workers or len(bodies)) as threads:
        return list(threads.map(lambda body: client.ask("/v1/completions", body), bodies))


def said(answer: Mapping[str, Any]) -> str:
    """The text of an answer."""
    return str(answer["choices"][0]["text"])


def count(answers: Sequence[Mapping[str, Any]]) -> int:
    """Tokens written."""
    return sum(answer["usage"]["completion_tokens"] for answer in answers)


def alone(model: TwinModel, prompt: str, gate: torch.Tensor, tokens: int) -> str:
    """What the materialised model of a gate writes."""
    plain: Any = model.materialize(gate)
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found = plain.generate(
            ids, max_new_tokens=tokens, do_sample=False, pad_token_id=model.tokenizer.pad_token_id or 0
        )
    return str(model.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def mixed(experts: int, rows: int) -> torch.Tensor:
    """Gates (row, expert) in which every expert has a part."""
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(SEED)).mul(2).softmax(dim=1)


def written(path: Path, number: int) -> list[str]:
    """Prompts of a file."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()[:number])
    return [str(row.get("prompt", row.get("text"))) for row in rows]


def made_up(model: TwinModel, number: int) -> list[str]:
    """Prompts of random tokens, 24 to 40 each."""
    generator = torch.Generator().manual_seed(SEED)
    size = model.backbone.config.vocab_size
    ids = [torch.randint(10, size, (24 + index % 17,), generator=generator) for index in range(number)]
    return [model.tokenizer.decode(one) for one in ids]


def stand_in(given: argparse.Namespace) -> TwinModel:
    """A base, and experts of low rank in every linear layer."""
    torch.manual_seed(SEED)
    backbone, tokenizer = random_llama(given.layers) if given.base is None else from_folder(given.base)
    layers = {n: m.weight.shape for n, m in backbone.named_modules() if n.endswith("_proj")}
    exclusive = {
        f"e{index}": {
            f"{name}.weight": LowRank(0.02 * torch.randn(out, given.rank), torch.randn(given.rank, into) / into**0.5)
            for name, (out, into) in layers.items()
        }
        for index in range(given.experts)
    }
    return TwinModel(backbone, exclusive, tokenizer=tokenizer)


def from_folder(folder: Path) -> tuple[Any, Any]:
    """A base in float32 and its tokenizer."""
    return load_backbone(folder, torch.float32), load_tokenizer(folder)


def random_llama(layers: int) -> tuple[Any, Any]:
    """A Llama of SmolLM2-135M's shape, whose tokens are words: w7 is token 7."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(config.vocab_size)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model: Any = LlamaForCausalLM(config)
    make: Any = PreTrainedTokenizerFast
    return model.eval(), make(tokenizer_object=words, pad_token="w0", unk_token="w2")


@contextmanager
def served(model: TwinModel, requests: int) -> Iterator[Client]:
    """A server in this process."""
    settings = ServeSettings(max_queue=4 * requests, timeout_s=600)
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(Engine(model, "twin", settings, Metrics())), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
