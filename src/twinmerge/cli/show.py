"""Shows results to people on stdout, in lines that fit 80 columns, or as JSON."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any


def show_result(result: Mapping[str, Any], as_json: bool, sentence: str, *, to_stderr: bool = False) -> None:
    """A result as one JSON line, or a sentence."""
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write((json.dumps(result) if as_json else sentence) + "\n")


def show_systems(systems: Sequence[Any], as_json: bool) -> None:
    """Merge methods: what each does and needs, in a few lines, or all of them as JSON."""
    if as_json:
        sys.stdout.write(json.dumps([asdict(system) for system in systems], indent=1) + "\n")
        return
    for system in systems:
        options = ", ".join(f"{key} {json.dumps(value)}" for key, value in system.options.items())
        sys.stdout.write(
            f"{system.name}: {system.summary}\n"
            f"  {system.paper}; protocol {system.protocol}; {', '.join(system.uses)}\n"
            f"  data: {system.data}\n"
            f"  options: {options or 'none'}\n"
        )


def show_notes(notes: Sequence[str]) -> None:
    """What a user should know of a result, on stderr."""
    for note in notes:
        sys.stderr.write(f"twinmerge: note: {note}\n")


def show_plan(found: Mapping[str, Any], as_json: bool) -> None:
    """A plan: a line a key, what belongs to it indented below."""
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if as_json else "".join(f"{line}\n" for line in _lines(found)))


def _lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list | tuple) and value:
            yield f"{indent}{key}:"
            yield from (f"{indent}  {_word(one)}" for one in value)
        else:
            yield f"{indent}{key}: {_word(value)}"


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return str(value) if value or isinstance(value, str) else "none"


def show_twin(artifact: Any, as_json: bool) -> None:
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

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{artifact.path}: a twin of {len(manifest.experts)} experts", title_justify="left")
    for column in ("expert", "mean rank", "max", "energy kept", "exclusive bytes", "head bytes"):
        table.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    for name, entry in manifest.experts.items():
        ranks = f"{entry.rank_mean:.1f}", str(entry.rank_max)
        sizes = f"{own[name]['exclusive']:,}", f"{own[name]['heads']:,}"
        table.add_row(name, *ranks, f"{entry.energy_kept:.1%}", *sizes)
    Console().print(table)
    recipe = manifest.recipe
    console.print("bytes: " + ", ".join(f"{part} {size:,}" for part, size in parts.items()))
    kept = recipe.exclusive.content()
    form = f"{kept.get('dtype') or 'as the base'}, directions weighed: {kept.get('weighting', 'none')}"
    console.print(f"exclusive parts: {ratio:.4f} x the base's bytes ({form})")
    for line in (
        *_router_lines(recipe.router, manifest.router),
        *_check_lines(manifest.check),
        _fallback_line(manifest.fallback),
        "built from:",
    ):
        console.print(line)
    for name, entry in manifest.inputs.items():
        console.print(f"  {name}: {entry.source}; licence: {entry.licence or 'none named'}")
        hashes = ", ".join(str(file.sha256)[:12] for file in entry.files.values())
        console.print(f"    sha256 {hashes}")
    for change in manifest.changes:
        console.print(f"{change.at}: {change.change} {change.expert}")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(f"built {manifest.created} with seed {recipe.seed}; {versions}")


def _router_lines(settings: Any, router: Any) -> Iterator[str]:
    """How inputs find their experts, and how well."""
    if router is None:
        yield "router: none; every call says gate or expert"
        return
    fitted = f", fitted in {router.precision}" if router.precision else ""
    yield f"router: {settings.method} on {settings.features}, {router.inputs_per_expert} inputs per expert{fitted}"
    yield (
        f"  held-out accuracy {router.accuracy:.2%}, calibration error {router.calibration_error:.4f}, "
        f"temperature {router.temperature:.3f}"
    )
    yield from _confused_lines(router.confused)


def _confused_lines(pairs: Sequence[Any]) -> Iterator[str]:
    """Experts that the router mixes up."""
    for pair in pairs:
        (first, second), (there, back) = pair.experts, pair.shares
        shown = f"{there:.1%} of the first's inputs go to the second, {back:.1%} back"
        yield f"  hard to tell apart: {first} and {second}; {shown}"
    if pairs:
        yield "    if one head can answer both, gate: groups mixes such experts; see docs/recipe.md"


def _fallback_line(names: Sequence[str] | None) -> str:
    """Which parameters no fast layer serves, in one line."""
    if not names:
        return "fall-back: " + ("found out when the twin is loaded" if names is None else "none, every layer is fast")
    return f"fall-back: {len(names)} parameters, first {names[0]}: a pass per distinct gate in a batch"


def _check_lines(found: Any) -> Iterator[str]:
    """What the check of a twin found."""
    if not found:
        yield "check: none was made of this twin"
        return
    yield (
        f"check on {found.rows} rows: gated against merged weights {found.forward:.1e}, "
        f"a row alone against its batch {found.alone:.1e}"
    )
    off = ", ".join(f"{name} {entry.distance:.3f}" for name, entry in found.experts.items())
    yield f"  distance to each expert, 1 being the shared expert's: {off or 'none compared'}"
