"""Knows the program: parses arguments, calls the library, prints; nothing heavy is imported before a command runs."""

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twinmerge import __version__
from twinmerge.errors import TwinMergeError
from twinmerge.hf.batches import BatchLimits, PredictSettings

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
OVERWRITE_HELP = "replace the folder, once the new one is complete, and drop what an interrupted run left"
FORMS = ("dense", "peft", "stacked-lora")
EXECUTORS = ("serial", "threads", "processes", "ray")
RESUME_HELP = "go on with what an interrupted run left, verified by hash"
SEED_HELP = "of DARE in mergekit's recipes (default: %(default)s)"


def program() -> None:
    """The process: `main`, its imports seldom searched for garbage, and not at all at the end."""
    gc.set_threshold(100_000)
    code = main()
    gc.freeze()
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        0, 1 (failed), 2 (what was asked cannot be done as asked) or 130 (interrupted).
    """
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except TwinMergeError as error:
        _complain(str(error), error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        _complain(f"{error.filename or 'the system'}: {error.strerror or error}", error)
        return EXIT_FAILED
    except KeyboardInterrupt as error:
        kept = hasattr(error, "__notes__")
        _complain("interrupted" if kept else "interrupted; nothing half-made was left", error)
        return EXIT_INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and options; docs/cli.md is generated from it."""
    parser = argparse.ArgumentParser(
        prog="twinmerge",
        description="Several fine-tuned models of one base become one model that mixes them for every input.",
    )
    parser.add_argument("--version", action="version", version=f"twinmerge {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    build = _command(commands, "build", _build, "build a twin from a recipe: experts in, one folder out")
    build.add_argument("recipe", type=Path, help="YAML file: base, experts, shared, exclusive, router")
    build.add_argument("--out", type=Path, required=True, help="folder of the twin, must not exist")
    build.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    _add_check_option(build)
    build.add_argument(
        "--fast-only",
        action="store_true",
        help="refuse parameters that no fast layer serves: a pass a distinct gate",
    )
    _add_work_options(build)

    merge = _command(commands, "merge", _merge, "merge models into one plain model folder (our recipes and mergekit's)")
    merge.add_argument("recipe", type=Path, help="YAML file: base, experts, shared; or mergekit's keys")
    merge.add_argument("--out", type=Path, required=True, help="folder of the model, must not exist")
    merge.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    merge.add_argument(
        "--hash-inputs", action="store_true", help="record the SHA-256 of every input file, another pass over them"
    )
    merge.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    _add_work_options(merge)

    plan = _command(
        commands, "plan", _plan, "check a recipe before it runs: what is read, written, needed, and for how long"
    )
    plan.add_argument("recipe", type=Path, help="YAML file of `twinmerge build` or `twinmerge merge`")
    plan.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    _add_plan_options(plan)

    inspect = _command(commands, "inspect", _inspect, "show experts, ranks, energy kept, bytes, router and provenance")
    inspect.add_argument("twin", type=Path, help="folder of a twin")

    add = _command(commands, "add", _grow, "add an expert to a twin: its exclusive part and the router are computed")
    _add_change_options(add, new=True)

    remove = _command(commands, "remove", _grow, "take an expert out of a twin; the router is fitted anew")
    _add_change_options(remove, new=False)

    replace = _command(commands, "replace", _grow, "exchange an expert of a twin for another of its name")
    _add_change_options(replace, new=True)

    export = _command(commands, "export", _export, "write a twin as other tools load it")
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

    verify = _command(commands, "verify", _verify, "check the hash of every file of a twin")
    verify.add_argument("twin", type=Path, help="folder of a twin")

    predict = _command(commands, "predict", _predict, "answer rows of text, each by its own mix of experts")
    predict.add_argument("twin", type=Path, help="folder of a twin")
    predict.add_argument(
        "--input", type=Path, required=True, help='JSON lines: {"text": ...}, perhaps "text_pair"; - is standard input'
    )
    predict.add_argument(
        "--output", type=Path, required=True, help="JSON lines in input order, must not exist; - is standard output"
    )
    predict.add_argument(
        "--overwrite", action="store_true", help="replace the output, and what an interrupted run left of it"
    )
    predict.add_argument("--resume", action="store_true", help="go on with what an interrupted run left")
    predict.add_argument("--expert", help="use this expert alone instead of the router")
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
    predict.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")

    evaluate = _command(
        commands, "eval", _eval, "run every contestant of a suite and write results.json and report.html"
    )
    evaluate.add_argument("suite", type=Path, help="YAML file: tasks, experts, contestants")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for results; finished runs in it are kept")
    evaluate.add_argument("--seeds", type=int, nargs="+", help="only these seeds (default: the suite's)")
    evaluate.add_argument("--contestants", nargs="+", help="only these contestants (default: the suite's)")
    return parser


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
            "--router-data", type=Path, required=True, metavar="FILE", help="JSON lines of inputs that belong to it"
        )
    else:
        command.add_argument("--expert", required=True, metavar="NAME", help="which one")
    command.add_argument("--out", type=Path, help="write the new twin there and leave the old one as it is")
    command.add_argument("--overwrite", action="store_true", help="replace the folder of --out if it exists")
    _add_check_option(command)
    command.add_argument("--resume", action="store_true", help=RESUME_HELP)
    command.add_argument(
        "--root", type=Path, help="where the recipe's relative paths start (default: where they did in the build)"
    )


def _command(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
    command.set_defaults(run=run, command=name)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    return command


def _build(options: argparse.Namespace) -> None:
    from twinmerge.jobs.build import build

    with _progress() as progress:
        artifact = build(
            options.recipe,
            options.out,
            allow=_allowed(options),
            overwrite=options.overwrite,
            resume=options.resume,
            memory_bytes=options.memory,
            executor=_executor(options),
            check=not options.no_check,
            fast_only=options.fast_only,
            progress=progress,
        )
    _print_notes(artifact.manifest.notes)
    _print_twin(artifact, options.json)


def _merge(options: argparse.Namespace) -> None:
    from twinmerge.jobs.merge import merge_models
    from twinmerge.merging.recipe import load_merge

    with _progress() as progress:
        manifest = merge_models(
            load_merge(options.recipe, options.seed),
            options.out,
            allow=_allowed(options),
            overwrite=options.overwrite,
            resume=options.resume,
            memory_bytes=options.memory,
            executor=_executor(options),
            hash_inputs=options.hash_inputs,
            progress=progress,
        )
    _print_notes(manifest["notes"])
    size = sum(file["bytes"] for file in manifest["files"].values())
    sentence = f"{options.out}: {manifest['tensors']} tensors, {size:,} bytes, {manifest['recipe']['method']}"
    _print_result({"model": str(options.out), **manifest}, options.json, sentence)


def _plan(options: argparse.Namespace) -> None:
    from twinmerge.jobs.plan import describe, describe_twin
    from twinmerge.merging.plan import plan_merge
    from twinmerge.merging.recipe import load_merge, twin_keys

    executor, folder = _executor(options), options.recipe.resolve().parent
    if twin_keys(options.recipe):
        from twinmerge.jobs.build import open_plan
        from twinmerge.twin.recipe import Recipe

        plan = open_plan(Recipe.load(options.recipe), _allowed(options))
        found = describe_twin(plan, options.memory, executor, folder)
    else:
        merge = plan_merge(load_merge(options.recipe, options.seed), _allowed(options))
        found = describe(merge, options.memory, executor, folder)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    for key, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else value
        sys.stdout.write(f"{key}: {shown}\n")


def _grow(options: argparse.Namespace) -> None:
    from twinmerge.jobs import grow

    with _progress() as progress:
        common: dict[str, Any] = {
            "out": options.out,
            "overwrite": options.overwrite,
            "resume": options.resume,
            "root": options.root,
            "check": not options.no_check,
            "progress": progress,
        }
        if options.command == "remove":
            artifact = grow.remove(options.twin, options.expert, **common)
        else:
            name, path = options.expert
            change = grow.add if options.command == "add" else grow.replace
            artifact = change(options.twin, name, model=path, router_data=options.router_data, **common)
    _print_twin(artifact, options.json)


def _export(options: argparse.Namespace) -> None:
    from twinmerge.jobs.export import export

    with _progress() as progress:
        note = export(
            options.twin,
            options.out,
            to=options.to,
            gate=options.gate,
            expert=options.expert,
            overwrite=options.overwrite,
            progress=progress,
        )
    licences = ", ".join(f"{name} {licence or 'none named'}" for name, licence in note["licences"].items())
    sentence = f"{options.out}: {options.to} of {options.twin}; licences: {licences}"
    _print_result({"out": str(options.out), **note}, options.json, sentence)


def _inspect(options: argparse.Namespace) -> None:
    from twinmerge.twin.artifact import TwinArtifact

    _print_twin(TwinArtifact.open(options.twin), options.json)


def _verify(options: argparse.Namespace) -> None:
    from twinmerge.twin.artifact import TwinArtifact

    count = TwinArtifact.open(options.twin).verify()
    _print_result({"twin": str(options.twin), "files": count, "intact": True}, options.json, f"{count} files intact")


def _predict(options: argparse.Namespace) -> None:
    from twinmerge.files.rows import STANDARD
    from twinmerge.jobs.predict import predict_file

    settings = PredictSettings(
        options.expert, BatchLimits(options.batch_size, options.batch_tokens), options.max_new_tokens
    )
    with _progress(quiet=True) as progress:
        found = predict_file(
            options.twin,
            options.input,
            options.output,
            settings,
            device=options.device,
            overwrite=options.overwrite,
            resume=options.resume,
            progress=lambda done, total: progress("predicting", done, total),
        )
    counts = ", ".join(f"{name} {count}" for name, count in found["experts"].items())
    counts += f", left to the shared expert {found['fallback']}" if found["fallback"] else ""
    resumed = f", {found['resumed']} of them by the run before" if found["resumed"] else ""
    sentence = f"{found['rows']} rows{resumed}: {counts}"
    result = {"output": str(options.output), **found}
    _print_result(result, options.json, sentence, to_stderr=options.output == STANDARD)


def _eval(options: argparse.Namespace) -> None:
    from twinmerge.eval.harness import run_suite
    from twinmerge.eval.suite import Suite
    from twinmerge.report.page import write_report
    from twinmerge.report.tables import terminal_table

    suite = Suite.load(options.suite)
    with _progress() as progress:
        result = run_suite(suite, options.out, seeds=options.seeds, contestants=options.contestants, progress=progress)
    page = write_report(result, options.out)
    if options.json:
        sys.stdout.write(result.model_dump_json(indent=1) + "\n")
        return
    from rich.console import Console

    Console().print(terminal_table(result))
    sys.stdout.write(f"report: {page}\n")


def _print_twin(artifact: Any, as_json: bool) -> None:
    """A twin for people, or its manifest with bytes per part."""
    manifest, parts, own = artifact.manifest, artifact.bytes_per_part(), artifact.bytes_per_expert()
    ratio = parts["exclusive"] / manifest.base.bytes
    if as_json:
        content = {key: value for key, value in manifest.content().items() if key != "files"}
        for name, entry in content["experts"].items():
            entry |= {"exclusive_bytes": own[name]["exclusive"], "head_bytes": own[name]["heads"]}
        summary = {"changes": [], **content, "bytes": parts, "exclusive_ratio": ratio}
        sys.stdout.write(json.dumps({"twin": str(artifact.path), **summary}, indent=1) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    experts = Table(title=f"{artifact.path}: a twin of {len(manifest.experts)} experts", title_justify="left")
    for column in ("expert", "mean rank", "max rank", "energy kept", "exclusive bytes", "head bytes"):
        experts.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    for name, entry in manifest.experts.items():
        ranks = f"{entry.rank_mean:.1f}", str(entry.rank_max)
        sizes = f"{own[name]['exclusive']:,}", f"{own[name]['heads']:,}"
        experts.add_row(name, *ranks, f"{entry.energy_kept:.1%}", *sizes)
    inputs = Table(title="built from", title_justify="left")
    for column in ("input", "sha256", "licence", "source"):
        inputs.add_column(column, overflow="fold")
    for name, entry in manifest.inputs.items():
        hashes = ", ".join(str(file.sha256)[:12] for file in entry.files.values())
        inputs.add_row(name, hashes, entry.licence or "none named", entry.source)
    router, recipe = manifest.router, manifest.recipe
    console = Console()
    console.print(experts)
    console.print("bytes: " + ", ".join(f"{part} {size:,}" for part, size in parts.items()), highlight=False)
    console.print(f"exclusive parts: {ratio:.4f} x the base's bytes", highlight=False)
    console.print(
        f"router: {recipe.router.method} on {recipe.router.features}, held-out accuracy {router.accuracy:.2%}, "
        f"calibration error {router.calibration_error:.4f}, temperature {router.temperature:.3f}, "
        f"{router.inputs_per_expert} inputs per expert",
        highlight=False,
    )
    console.print(_check_line(manifest.check), highlight=False)
    console.print(_fallback_line(manifest.fallback), highlight=False)
    console.print(inputs)
    for change in manifest.changes:
        console.print(f"{change.at}: {change.change} {change.expert}", highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(f"built {manifest.created} with seed {recipe.seed}; {versions}", highlight=False)


def _fallback_line(names: Sequence[str] | None) -> str:
    """Which parameters no fast layer serves, in one line."""
    if not names:
        return "fall-back: " + ("found out when the twin is loaded" if names is None else "none, every layer is fast")
    return f"fall-back: {len(names)} parameters, first {names[0]}: a pass per distinct gate in a batch"


def _check_line(found: Any) -> str:
    """What the check of a twin found, in one line."""
    if not found:
        return "check: none was made of this twin"
    off = ", ".join(f"{name} {entry.distance:.3f}" for name, entry in found.experts.items())
    return (
        f"check on {found.rows} rows: gated against merged weights {found.forward:.1e}, a row alone against its "
        f"batch {found.alone:.1e}; distance to each expert, 1 being the shared expert's: {off or 'none compared'}"
    )


def _print_result(result: dict[str, Any], as_json: bool, sentence: str, *, to_stderr: bool = False) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write((json.dumps(result) if as_json else sentence) + "\n")


@contextmanager
def _progress(*, quiet: bool = False) -> Iterator[Any]:
    """Bars on stderr with rate and time left; where it is no terminal, one line per finished stage unless `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    stages: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total, rate="")
            task = bars._tasks[stages[stage]]
            bars.update(stages[stage], completed=done, rate=f"{task.speed:,.1f}/s" if task.speed else "")
            if total is not None and done >= total:
                if bars.disable and not quiet:
                    console.print(f"{stage}: {total}", highlight=False)
                del stages[stage]

        yield report


def _complain(message: str, error: BaseException) -> None:
    """In one line, with what is kept of the work."""
    line = "; ".join([message, *getattr(error, "__notes__", [])])
    sys.stderr.write(f"twinmerge: error: {' '.join(line.split())}\n")


def _allowed(options: argparse.Namespace) -> Any:
    from twinmerge.models.compatible import Allow

    return Allow(options.allow_unrelated, options.allow_config_differences, options.allow_vocabulary_differences)


def _executor(options: argparse.Namespace) -> Any:
    from twinmerge.merging.executor import make_executor

    return make_executor(options.executor, options.workers, options.ray_address)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        sys.stderr.write(f"twinmerge: note: {note}\n")


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value
