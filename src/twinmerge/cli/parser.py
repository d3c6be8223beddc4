"""All commands and options of the program; docs/cli.md is generated from it."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinmerge import __version__
from twinmerge.cli import commands as run
from twinmerge.hf.batches import BatchLimits, PredictSettings, Writing
from twinmerge.serve.settings import KEY_VARIABLE, ServeSettings

OVERWRITE_HELP = "replace the folder, once the new one is complete, and drop what an interrupted run left"
FORMS = ("dense", "peft", "stacked-lora")
EXECUTORS = ("serial", "threads", "processes", "ray")
RESUME_HELP = "go on with what an interrupted run left, verified by hash"
SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.3)
"""What `tune` tries where nothing else is said."""
SEED_HELP = "of DARE in mergekit's recipes (default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """All commands and options; docs/cli.md is generated from it."""
    parser = argparse.ArgumentParser(
        prog="twinmerge",
        description="Several fine-tuned models of one base become one model that mixes them for every input.",
    )
    parser.add_argument("--version", action="version", version=f"twinmerge {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    build = _command(commands, "build", run.build, "build a twin from a recipe: experts in, one folder out")
    build.add_argument("recipe", type=Path, help="YAML file: base, experts, shared, exclusive, router")
    build.add_argument("--out", type=Path, required=True, help="folder of the twin, must not exist")
    build.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    _add_check_option(build)
    _add_precision_option(build)
    build.add_argument(
        "--fast-only",
        action="store_true",
        help="refuse parameters that no fast layer serves: a pass a distinct gate",
    )
    _add_work_options(build)

    init = _command(
        commands, "init", run.init, "draft a recipe of models: what they are, and what is missing", json=False
    )
    init.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id of an expert, or of the base")
    init.add_argument("--base", help="folder or hub id of the base (default: looked for among the models)")

    merge = _command(
        commands, "merge", run.merge, "merge models into one plain model folder (recipes of ours or mergekit's)"
    )
    merge.add_argument("recipe", type=Path, help="YAML file: base, experts, shared; or mergekit's keys")
    merge.add_argument("--out", type=Path, required=True, help="folder of the model, must not exist")
    merge.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    merge.add_argument(
        "--hash-inputs", action="store_true", help="record the SHA-256 of every input file, another pass over them"
    )
    merge.add_argument("--seed", type=_whole, default=0, help=SEED_HELP)
    _add_work_options(merge)

    tune = _command(commands, "tune", run.tune, "choose the scaling of a merge on labelled validation rows")
    tune.add_argument("recipe", type=Path, help="YAML file of `twinmerge build` or `twinmerge merge`, not mergekit's")
    tune.add_argument(
        "--rows",
        type=_named_path,
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="labelled rows of every expert, as `predict --input` takes them; never those that results are reported on",
    )
    tune.add_argument(
        "--scalings",
        type=_finite,
        nargs="+",
        default=SCALINGS,
        help="what is tried; of equal ones the first wins (default: 0.1 0.2 0.3 0.4 0.5 0.7 1 1.3)",
    )
    tune.add_argument("--out", type=Path, required=True, help="the new recipe, in the folder of the old one")
    tune.add_argument("--overwrite", action="store_true", help="replace it if it exists")

    _command(
        commands, "methods", run.methods, "list every merge method: paper, protocol, data, options, where it works"
    )

    plan = _command(commands, "plan", run.plan, "check a recipe before it runs: what is read, written and needed")
    plan.add_argument("recipe", type=Path, help="YAML file of `twinmerge build` or `twinmerge merge`")
    plan.add_argument("--seed", type=_whole, default=0, help=SEED_HELP)
    _add_plan_options(plan)

    inspect = _command(commands, "inspect", run.inspect, "show experts, ranks, energy kept, bytes, router, provenance")
    inspect.add_argument("twin", type=Path, help="folder of a twin")

    add = _command(commands, "add", run.grow, "add an expert to a twin: its exclusive part and the router are computed")
    _add_change_options(add, new=True)

    remove = _command(commands, "remove", run.grow, "take an expert out of a twin; the router is fitted anew")
    _add_change_options(remove, new=False)

    replace = _command(commands, "replace", run.grow, "exchange an expert of a twin for another of its name")
    _add_change_options(replace, new=True)

    export = _command(commands, "export", run.export, "write a twin as other tools load it")
    export.add_argument("twin", type=Path, help="folder of a twin")
    export.add_argument(
        "--to",
        required=True,
        choices=FORMS,
        help="a transformers model for one gate, a PEFT adapter per expert, or one adapter of all experts",
    )
    export.add_argument("--out", type=Path, required=True, help="folder to write, must not exist")
    export.add_argument("--gate", type=_weights, help='for dense: weights such as "sms=0.7,trec=0.3", others are 0')
    export.add_argument("--expert", metavar="NAME", help="for dense: this expert alone")
    export.add_argument("--overwrite", action="store_true", help="replace the folder, once the new one is complete")

    verify = _command(commands, "verify", run.verify, "check the hash of every file of a twin")
    verify.add_argument("twin", type=Path, help="folder of a twin")

    predict = _command(commands, "predict", run.predict, "answer rows, each by its own mix of experts")
    predict.add_argument("twin", type=Path, help="folder of a twin")
    predict.add_argument(
        "--input",
        type=Path,
        required=True,
        help='JSON lines: {"text": ...}, perhaps "text_pair"; {"prompt": ...}, {"messages": [...]} or {"image": PATH}; '
        "CSV, parquet or text, FILE#COLUMN; a folder of images; - is standard input",
    )
    predict.add_argument(
        "--output", type=Path, required=True, help="JSON lines in input order, must not exist; - is standard output"
    )
    predict.add_argument(
        "--overwrite", action="store_true", help="replace the output, and what an interrupted run left of it"
    )
    predict.add_argument("--resume", action="store_true", help="go on with what an interrupted run left")
    predict.add_argument("--expert", help="use this expert alone instead of the router")
    predict.add_argument("--gate", type=_weights, help='this mix instead of the router, such as "sms=0.7,trec=0.3"')
    predict.add_argument(
        "--batch-size", type=_positive, default=BatchLimits.rows, help="rows a batch, at most (default: %(default)s)"
    )
    predict.add_argument(
        "--batch-tokens",
        type=_positive,
        default=BatchLimits.tokens,
        help="rows times tokens of a batch, padding included, at most (default: %(default)s)",
    )
    predict.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=PredictSettings.max_new_tokens,
        help="of a causal LM's continuation (default: %(default)s)",
    )
    predict.add_argument("--num-beams", type=_positive, help="of a beam search (default: as the expert's config says)")
    predict.add_argument(
        "--temperature", type=float, help="sample at this temperature; 0 takes the likeliest token (default: that)"
    )
    predict.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this probability")
    predict.add_argument("--top-k", type=_positive, help="sample from so many of the likeliest tokens")
    predict.add_argument("--seed", type=_whole, default=Writing.seed, help="of sampling (default: %(default)s)")
    predict.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text ends before this; may be given again"
    )
    predict.add_argument(
        "--uncertain-below",
        type=_share,
        metavar="P",
        help='mark answers of which the router is less sure than this probability as "uncertain"',
    )
    predict.add_argument("--leave-out", action="store_true", help="give uncertain rows no answer at all")
    predict.add_argument(
        "--skip-unreadable",
        action="store_true",
        help='answer rows whose images cannot be read with an "error" (default: refuse the first)',
    )
    _add_precision_option(predict)
    predict.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")

    _add_serve(commands)

    evaluate = _command(
        commands, "eval", run.evaluate, "run every contestant of a suite and write results.json and report.html"
    )
    evaluate.add_argument("suite", type=Path, help="YAML file: tasks, experts, contestants")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for results; finished runs in it are kept")
    evaluate.add_argument("--seeds", type=_whole, nargs="+", help="only these seeds (default: the suite's)")
    evaluate.add_argument("--contestants", nargs="+", help="only these contestants (default: the suite's)")
    return parser


def _add_serve(commands: Any) -> None:
    default = ServeSettings()
    serve = _command(
        commands,
        "serve",
        run.serve,
        "answer requests over HTTP, in OpenAI's forms, each by its own mix",
        json=False,
    )
    serve.add_argument("twin", type=Path, help="folder of a twin")
    serve.add_argument("--host", default=default.host, help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=_whole, default=default.port, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--name", help="of the twin in requests (default: its folder's)")
    serve.add_argument(
        "--api-key",
        help=f"without it nothing is answered but /health (default: {KEY_VARIABLE}, or none)",
    )
    limits: tuple[tuple[str, Callable[[str], Any], Any, str], ...] = (
        ("--max-batch-rows", _positive, default.max_batch_rows, "requests in one batch or pass, at most"),
        ("--max-batch-tokens", _positive, default.max_batch_tokens, "tokens of one batch or pass, at most"),
        ("--wait-ms", _milliseconds, default.wait_ms, "a batch waits so long for more requests"),
        (
            "--max-queue",
            _positive,
            default.max_queue,
            "requests accepted and not yet answered; more get status 429",
        ),
        (
            "--max-new-tokens",
            _positive,
            default.max_new_tokens,
            "that a request may ask for, and what a chat gets that does not say",
        ),
        (
            "--cache-tokens",
            _positive,
            default.cache_tokens,
            "prompts and continuations under way, together; what does not fit waits",
        ),
        ("--max-body", _bytes, "1MB", "of a request, at most; more gets status 413"),
        ("--timeout", _seconds, default.timeout_s, "seconds that a request may take, its answer sent"),
        (
            "--drain",
            _seconds,
            default.drain_s,
            "seconds that requests under way get to finish when the server is stopped",
        ),
    )
    for option, kind, value, words in limits:
        serve.add_argument(option, type=kind, default=value, help=f"{words} (default: %(default)s)")
    serve.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")

    chat = _command(commands, "chat", run.chat, "talk to a served twin, or to a folder", json=False)
    _add_asking(chat)
    chat.add_argument("text", nargs="?", help="one message; without it every line of standard input is one")
    chat.add_argument("--system", metavar="TEXT", help="a system message that goes before")
    chat.add_argument("--max-tokens", type=_positive, help="of an answer (default: the server's)")
    chat.add_argument("--temperature", type=_warmth, default=0.0, help="0 takes the likeliest token (default: 0)")
    chat.add_argument("--seed", type=_whole, help="of sampling")

    classify = _command(commands, "classify", run.classify, "label texts by a served twin, or by a folder")
    _add_asking(classify)
    classify.add_argument("texts", nargs="+", metavar="TEXT", help="to be labelled")

    route = _command(commands, "route", run.route, "where texts go at a served twin, or in a folder")
    _add_asking(route, chooses=False)
    route.add_argument("texts", nargs="+", metavar="TEXT", help="to be routed")


def _add_asking(command: argparse.ArgumentParser, *, chooses: bool = True) -> None:
    command.add_argument("target", help="http://HOST:PORT of a server, or the folder of a twin")
    command.add_argument("--api-key", help=f"of the server (default: {KEY_VARIABLE})")
    if chooses:
        command.add_argument("--model", help="NAME, NAME:shared or NAME:EXPERT (default: the router says)")
        command.add_argument("--gate", type=_weights, help='a mix such as "sms=0.7,trec=0.3", others are 0')


def _add_precision_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        help="of matrix products; auto is the faster on this machine (default: no less precise than the weights)",
    )


def _add_check_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-check",
        action="store_true",
        help="publish without trying the finished twin on a few router rows against merged weights and its experts",
    )


def _add_work_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", action="store_true", help=RESUME_HELP)
    _add_plan_options(command)


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory",
        type=_bytes,
        default="2GB",
        help="what a process may take; each worker of processes and ray is one (default: %(default)s)",
    )
    command.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="threads",
        help="where tensors are worked on; the result has the same bits (default: %(default)s)",
    )
    command.add_argument("--workers", type=_positive, help="tensors in work at a time (default: number of cores)")
    command.add_argument(
        "--ray-address", metavar="HOST:PORT", help="of a Ray cluster that sees the same files (default: start one here)"
    )
    command.add_argument(
        "--allow-unrelated", action="store_true", help="merge models that are no fine-tunes of the base"
    )
    command.add_argument(
        "--allow-config-differences", action="store_true", help="merge models whose config.json differ, as in rope"
    )
    command.add_argument(
        "--allow-vocabulary-differences", action="store_true", help="merge models whose tokenizers give other ids"
    )


def _add_change_options(command: argparse.ArgumentParser, *, new: bool) -> None:
    command.add_argument("twin", type=Path, help="folder of a twin, replaced whole once the new one is complete")
    if new:
        command.add_argument(
            "--expert",
            type=_named_path,
            required=True,
            metavar="NAME=PATH",
            help="the expert's name and its folder, hub id or LoRA adapter",
        )
        command.add_argument(
            "--router-data",
            type=Path,
            metavar="FILE",
            help="inputs that belong to it, as `predict --input` takes them; a twin without a router needs none",
        )
    else:
        command.add_argument("--expert", required=True, metavar="NAME", help="which one")
    command.add_argument("--out", type=Path, help="write the new twin there and leave the old one as it is")
    command.add_argument("--overwrite", action="store_true", help="replace the folder of --out if it exists")
    _add_check_option(command)
    _add_precision_option(command)
    command.add_argument("--resume", action="store_true", help=RESUME_HELP)
    command.add_argument(
        "--root", type=Path, help="where the recipe's relative paths start (default: where they did in the build)"
    )


def _command(commands: Any, name: str, action: Any, help_text: str, *, json: bool = True) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
    command.set_defaults(run=action, command=name)
    if json:
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return command


def _bytes(text: str) -> int:
    """A size such as 700MB or 2GB; units are powers of ten."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < 10**18:
        raise argparse.ArgumentTypeError(f"must be a size such as 700MB or 2GB, found {text!r}")
    return int(size)


def _named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, found {text!r}")
    return name, path


def _weights(text: str) -> dict[str, float]:
    """A gate such as sms=0.7,trec=0.3."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not math.isfinite(weight):
            raise argparse.ArgumentTypeError(f'must be weights such as "sms=0.7,trec=0.3", found {part!r} in {text!r}')
        weights[name] = weight
    return weights


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, found {text!r}")
    return number


def _whole(text: str) -> int:
    return _integer(text, 0)


def _positive(text: str) -> int:
    return _integer(text, 1)


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, found {text!r}")
    return number


def _warmth(text: str) -> float:
    return _number(text, "a number, 0 or more", least=0.0)


def _milliseconds(text: str) -> float:
    return _number(text, "milliseconds, 0 or more", least=0.0)


def _seconds(text: str) -> float:
    return _number(text, "seconds, 1 or more", least=1.0)


def _number(text: str, what: str, *, least: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be {what}, found {text!r}")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, found {text!r}")
    return number
