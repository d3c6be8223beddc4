"""What each command does: calls the library, shows what came of it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from twinmerge.cli.progress import shown_progress
from twinmerge.cli.show import show_notes, show_plan, show_result, show_systems, show_twin
from twinmerge.hf.batches import BatchLimits, PredictSettings, Writing
from twinmerge.serve.settings import KEY_VARIABLE, ServeSettings


def build(options: argparse.Namespace) -> None:
    """Build a twin."""
    from twinmerge.jobs.build import build

    with shown_progress() as progress:
        artifact = build(
            options.recipe,
            options.out,
            **_work(options),
            check=not options.no_check,
            fast_only=options.fast_only,
            precision=options.precision,
            progress=progress,
        )
    show_notes(artifact.manifest.notes)
    show_twin(artifact, options.json)


def init(options: argparse.Namespace) -> None:
    """Draft a recipe."""
    from twinmerge.jobs.init import draft_recipe

    sys.stdout.write(draft_recipe(options.models, base=options.base))


def methods(options: argparse.Namespace) -> None:
    """List merge methods."""
    from twinmerge.merging.catalogue import systems

    show_systems(systems(), options.json)


def merge(options: argparse.Namespace) -> None:
    """Merge models."""
    from twinmerge.jobs.documents import merge_file

    with shown_progress() as progress:
        manifest = merge_file(
            options.recipe,
            options.out,
            options.seed,
            **_work(options),
            hash_inputs=options.hash_inputs,
            progress=progress,
        )
    show_notes(manifest["notes"])
    size = sum(file["bytes"] for file in manifest["files"].values())
    sentence = f"{options.out}: {manifest['tensors']} tensors, {size:,} bytes, {manifest['recipe']['method']}"
    show_result({"model": str(options.out), **manifest}, options.json, sentence)


def tune(options: argparse.Namespace) -> None:
    """Choose a scaling."""
    from twinmerge.files.tables import RowFile
    from twinmerge.jobs.tune import tune

    with shown_progress() as progress:
        tuned = tune(
            options.recipe,
            {name: RowFile.parse(words, Path()) for name, words in options.rows},
            options.out,
            scalings=options.scalings,
            overwrite=options.overwrite,
            progress=progress,
        )
    scores = ", ".join(f"{scaling:g} {score:.2%}" for scaling, score in tuned.scores.items())
    sentence = f"{options.out}: {tuned.method.method} with scaling {tuned.scaling:g}; accuracy on validation: {scores}"
    result = {"recipe": str(options.out), "scaling": tuned.scaling, "accuracy": list(tuned.scores.items())}
    show_result(result, options.json, sentence)


def plan(options: argparse.Namespace) -> None:
    """Check a recipe."""
    from twinmerge.jobs.documents import joined
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
        merge = plan_merge(load_merge(options.recipe, options.seed, join=joined), _allowed(options))
        found = describe(merge, options.memory, executor, folder)
    show_plan(found, options.json)


def grow(options: argparse.Namespace) -> None:
    """Add, remove or replace an expert."""
    from twinmerge.jobs import grow

    with shown_progress() as progress:
        common: dict[str, Any] = {
            "out": options.out,
            "overwrite": options.overwrite,
            "resume": options.resume,
            "root": options.root,
            "check": not options.no_check,
            "precision": options.precision,
            "progress": progress,
        }
        if options.command == "remove":
            artifact = grow.remove(options.twin, options.expert, **common)
        else:
            name, path = options.expert
            change = grow.add if options.command == "add" else grow.replace
            artifact = change(options.twin, name, model=path, router_data=options.router_data, **common)
    show_twin(artifact, options.json)


def export(options: argparse.Namespace) -> None:
    """Write a twin as other tools load it."""
    from twinmerge.jobs.export import export

    with shown_progress() as progress:
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
    show_result({"out": str(options.out), **note}, options.json, sentence)


def inspect(options: argparse.Namespace) -> None:
    """Show a twin."""
    from twinmerge.twin.artifact import TwinArtifact

    show_twin(TwinArtifact.open(options.twin), options.json)


def verify(options: argparse.Namespace) -> None:
    """Check the hashes of a twin."""
    from twinmerge.twin.artifact import TwinArtifact

    count = TwinArtifact.open(options.twin).verify()
    show_result({"twin": str(options.twin), "files": count, "intact": True}, options.json, f"{count} files intact")


def predict(options: argparse.Namespace) -> None:
    """Answer rows."""
    from twinmerge.files.rows import STANDARD
    from twinmerge.jobs.predict import predict_file

    settings = PredictSettings(
        options.expert,
        BatchLimits(options.batch_size, options.batch_tokens),
        options.max_new_tokens,
        options.uncertain_below,
        options.leave_out,
        options.skip_unreadable,
        options.precision,
        options.gate,
        Writing(
            options.num_beams, options.temperature, options.top_p, options.top_k, options.seed, tuple(options.stop)
        ),
    )
    with shown_progress(quiet=True) as progress:
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
    if found["uncertain"] is not None:
        counts += f"; {found['uncertain']} uncertain" + (", left out" if options.leave_out else "")
    counts += f"; {found['unreadable']} unreadable" if found["unreadable"] else ""
    resumed = f", {found['resumed']} of them by the run before" if found["resumed"] else ""
    sentence = f"{found['rows']} rows{resumed} in {found['precision']}: {counts}"
    result = {"output": str(options.output), **found}
    show_result(result, options.json, sentence, to_stderr=options.output == STANDARD)


def serve(options: argparse.Namespace) -> None:
    """Answer requests over HTTP."""
    from twinmerge.serve.server import serve

    settings = ServeSettings(
        host=options.host,
        port=options.port,
        name=options.name,
        api_key=_key(options),
        max_batch_rows=options.max_batch_rows,
        max_batch_tokens=options.max_batch_tokens,
        wait_ms=options.wait_ms,
        max_queue=options.max_queue,
        max_new_tokens=options.max_new_tokens,
        cache_tokens=options.cache_tokens,
        max_body_bytes=options.max_body,
        timeout_s=options.timeout,
        drain_s=options.drain,
    )
    serve(options.twin, settings, device=options.device)


def chat(options: argparse.Namespace) -> None:
    """Talk to a twin."""
    from twinmerge.serve.client import client_of

    said = [] if options.system is None else [{"role": "system", "content": options.system}]
    wish = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}
    with client_of(options.target, _key(options)) as client:
        asked = {**_asked(client, options), **{name: value for name, value in wish.items() if value is not None}}
        for text in [options.text] if options.text is not None else map(str.strip, sys.stdin):
            said.append({"role": "user", "content": text})
            answer = ""
            for event in client.stream("/v1/chat/completions", {**asked, "messages": said}):
                new = event["choices"][0]["delta"].get("content") or ""
                sys.stdout.write(new)
                sys.stdout.flush()
                answer += new
                twin = event["twin"]
            said.append({"role": "assistant", "content": answer})
            sys.stdout.write("\n")
            sys.stderr.write(f"{twin['expert'] or 'the shared expert'}: {_gate_line(twin['gate'])}\n")


def classify(options: argparse.Namespace) -> None:
    """Label texts."""
    from twinmerge.serve.client import client_of

    with client_of(options.target, _key(options)) as client:
        found = client.ask("/classify", {**_asked(client, options), "input": options.texts})["data"]
    left_out = {"index", "expert", "gate", "fallback", "confidence", "second"}
    for answer in found:
        said = ", ".join(f"{name} {value}" for name, value in answer.items() if name not in left_out)
        show_result(answer, options.json, f"{said}; {answer['expert']}: {_gate_line(answer['gate'])}")


def route(options: argparse.Namespace) -> None:
    """Say where texts go."""
    from twinmerge.serve.client import client_of

    with client_of(options.target, _key(options)) as client:
        found = client.ask("/v1/route", {"model": client.model(), "input": options.texts})["data"]
    for answer in found:
        left = ", left to the shared expert" if answer["fallback"] else ""
        sentence = f"{answer['expert']} ({answer['confidence']:.1%} sure{left}): {_gate_line(answer['gate'])}"
        show_result(answer, options.json, sentence)


def _key(options: argparse.Namespace) -> str | None:
    return options.api_key or os.environ.get(KEY_VARIABLE) or None


def _asked(client: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Who is to answer."""
    asked = {"model": options.model or client.model()}
    return asked if options.gate is None else {**asked, "twin": {"gate": options.gate}}


def _gate_line(gate: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in gate.items() if weight) or "nothing mixed in"


def evaluate(options: argparse.Namespace) -> None:
    """Run a suite."""
    from twinmerge.eval.harness import run_suite
    from twinmerge.eval.suite import Suite
    from twinmerge.report.page import write_report
    from twinmerge.report.tables import terminal_table

    suite = Suite.load(options.suite)
    with shown_progress() as progress:
        result = run_suite(suite, options.out, seeds=options.seeds, contestants=options.contestants, progress=progress)
    page = write_report(result, options.out)
    if options.json:
        sys.stdout.write(result.model_dump_json(indent=1) + "\n")
        return
    from rich.console import Console

    Console().print(terminal_table(result))
    sys.stdout.write(f"report: {page}\n")


def _work(options: argparse.Namespace) -> dict[str, Any]:
    """How `build` and `merge` do their work."""
    return {
        "allow": _allowed(options),
        "overwrite": options.overwrite,
        "resume": options.resume,
        "memory_bytes": options.memory,
        "executor": _executor(options),
    }


def _allowed(options: argparse.Namespace) -> Any:
    from twinmerge.models.compatible import Allow

    return Allow(options.allow_unrelated, options.allow_config_differences, options.allow_vocabulary_differences)


def _executor(options: argparse.Namespace) -> Any:
    from twinmerge.merging.executor import make_executor

    return make_executor(options.executor, options.workers, options.ray_address)
