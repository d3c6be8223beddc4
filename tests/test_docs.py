"""What the pages say is what the code does: commands, names, recipes, defaults, links."""

import argparse
import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import twinmerge
from benchmarks import plot_results
from scripts import generate_cli_docs
from twinmerge.cli.parser import build_parser
from twinmerge.eval.suite import ContestantSpec, Suite, TaskSpec, UnseenSpec
from twinmerge.merging.catalogue import systems
from twinmerge.merging.method import find_method, method_names
from twinmerge.merging.recipe import MergeRecipe
from twinmerge.twin.recipe import ExclusiveSettings, ExpertSource, Recipe

OURS = [name for name in method_names() if find_method(name).__module__.startswith("twinmerge.")]
ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page.name not in ("architecture.md", "cli.md")]
NAMED = {page.relative_to(ROOT).as_posix(): page for page in PAGES}


def read(name: str) -> str:
    return NAMED[name].read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# --- docs/cli.md --------------------------------------------------------------------------------------------------


def sample_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="p", description="Does it.", epilog="Ends.")
    parser.add_argument("--version", action="version", version="1")
    command = parser.add_subparsers(dest="command").add_parser("run", help="run it", description="Run it.")
    command.add_argument("source", help="from | where")
    command.add_argument("more", nargs="*")
    command.add_argument("--out", required=True, help="to")
    command.add_argument("--rank", "-r", type=int, default=3, metavar="N", help="directions (%(default)s)")
    command.add_argument("--mode", choices=["a", "b"], default="a", help="how")
    return parser


def test_cli_page_is_current() -> None:
    assert generate_cli_docs.main(["--check"]) == 0


def test_cli_page_shows_commands_arguments_and_defaults() -> None:
    page = generate_cli_docs.render(sample_parser())
    assert "## p\n\nDoes it." in page
    assert "p COMMAND …" in page
    assert "| `run` | run it |" in page
    assert "## p run\n\nRun it." in page
    assert "p run SOURCE [MORE …] --out OUT" in page
    assert r"| `SOURCE` | from \| where |" in page
    assert "| `--rank, -r N` | directions (3) |" in page
    assert "| `--mode a or b` | how |" in page
    assert "Ends." in page


def test_stale_cli_page_is_found_then_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_cli_docs, "PAGE", tmp_path / "cli.md")
    assert generate_cli_docs.main(["--check"]) == 1
    assert not (tmp_path / "cli.md").exists()
    assert generate_cli_docs.main([]) == 0
    assert generate_cli_docs.main(["--check"]) == 0


def test_every_option_has_a_help_text() -> None:
    for parser in (build_parser(), *generate_cli_docs.subcommands(build_parser())):
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{parser.prog} {action.dest}"


# --- commands -----------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """Lines of shell blocks that call twinmerge, by page."""
    for page in GUIDES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.removeprefix("$ ").startswith("twinmerge "):
                    yield page.name, line.removeprefix("$ ")


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_in_the_pages_parse(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert build_parser().parse_args(words), f"{page}: {line}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    parsers = [build_parser(), *generate_cli_docs.subcommands(build_parser())]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    spans = re.findall(r"`(twinmerge [^`]*|--[^`]*)`", prose(page.read_text(encoding="utf-8")))
    mentioned = {word for span in spans for word in re.findall(r"(?<!\S)--[a-z-]+", span)}
    assert mentioned <= known


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_make_targets_in_the_pages_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    shell = "\n".join(blocks(page, "bash"))
    mentioned = set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", shell, re.MULTILINE))
    assert mentioned <= targets


# --- Python and names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_python_in_the_pages_parses_and_uses_public_names(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tm"
        }
        assert used <= set(twinmerge.__all__)


def dotted_names() -> list[str]:
    found = {name for page in GUIDES for name in re.findall(r"`(twinmerge(?:\.\w+)+)`", prose(page.read_text("utf-8")))}
    return sorted(found)


@pytest.mark.parametrize("name", dotted_names())
def test_names_in_the_pages_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), attribute)


def documented_objects() -> list[str]:
    """What docs/api.md asks mkdocstrings for."""
    return re.findall(r"^::: (\S+)$", read("docs/api.md"), re.MULTILINE)


@pytest.mark.parametrize("name", documented_objects())
def test_objects_of_the_python_page_exist_and_say_what_they_do(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)
    assert (found.__doc__ or "").strip()


def test_every_public_name_is_on_the_python_page() -> None:
    public = {name: getattr(twinmerge, name) for name in twinmerge.__all__ if name != "__version__"}
    assert {f"{found.__module__}.{name}" for name, found in public.items()} <= set(documented_objects())


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_json_in_the_pages_is_json(page: Path) -> None:
    for block in blocks(page, "json"):
        assert json.loads(block)


# --- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_recipes_and_suites_in_the_pages_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        recipe = MergeRecipe if page.name == "merging.md" else Recipe
        assert (Suite if "contestants" in content else recipe).model_validate(content)


def recipe_page() -> tuple[str, str]:
    """The page's parts on recipes and on suites."""
    recipe, heading, suite = read("docs/recipe.md").partition("## A suite file")
    assert heading
    return recipe, suite


def documented(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", text, re.MULTILINE))


def default_of(field: FieldInfo) -> Any:
    if field.default is PydanticUndefined:
        return "required"
    return field.default.model_dump() if isinstance(field.default, BaseModel) else field.default


def recipe_defaults() -> dict[str, Any]:
    """Recipe keys and what the code takes for those that are left out."""
    found = {name: default_of(field) for name, field in Recipe.model_fields.items() if name != "root"}
    sources = ExpertSource.model_fields.items()
    found |= {f"experts.NAME.{field.alias or name}": default_of(field) for name, field in sources}
    for name in ("shared", "exclusive", "router"):
        found |= {f"{name}.{key}": value for key, value in found.pop(name).items()}
    return found | {"exclusive.budget": ExclusiveSettings.model_validate({}).budget}


def suite_defaults() -> dict[str, Any]:
    """Suite keys likewise."""
    found = {name: default_of(field) for name, field in Suite.model_fields.items() if name != "folder"}
    for part, model in (("tasks", TaskSpec), ("unseen", UnseenSpec), ("contestants", ContestantSpec)):
        found |= {f"{part}.NAME.{name}": default_of(field) for name, field in model.model_fields.items()}
    return found | {"router": "as in a recipe"}


def test_recipe_page_names_every_key_and_its_default() -> None:
    rows = documented(recipe_page()[0])
    rows = {key: value for key, value in rows.items() if key not in OURS}
    assert {key: yaml.safe_load(value) for key, value in rows.items()} == recipe_defaults()


def test_recipe_page_names_every_key_of_a_suite_and_its_default() -> None:
    expected = suite_defaults()
    rows = documented(recipe_page()[1])
    assert set(rows) == set(expected)
    for key, value in rows.items():
        assert value == expected[key] or yaml.safe_load(value) == expected[key], key


def test_recipe_page_names_every_merge_method_and_its_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| \[", recipe_page()[0], re.MULTILINE))
    assert set(rows) == set(OURS)
    for name in OURS:
        given = find_method(name)().model_dump(exclude={"method"})
        shown = {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+): (\S+)`", rows[name])}
        assert shown == given


def test_page_of_systems_agrees_with_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", read("docs/systems.md"), re.MULTILINE)
    expected = {}
    for system in (system for system in systems() if system.name in OURS):
        uses = [("no", "yes")[use in system.uses] for use in ("merge", "shared expert", "contestant")]
        expected[system.name] = " | ".join([system.protocol, system.data, *uses])
    assert dict(rows) == expected


# --- links --------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def layers() -> list[str]:
    """The rooms, from the top down, as import-linter holds them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return [name.removeprefix("twinmerge.") for name in contracts[0]["layers"]]


def test_directions_of_imports_in_the_pages_are_those_that_are_checked() -> None:
    assert f"`{' > '.join(layers())}`" in read("CONTRIBUTING.md")
    rooms = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", read("docs/architecture.md"), re.MULTILINE)
    assert rooms == layers()


# --- the landing page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_landing_page_shows_one_picture_and_at_most_ten_lines_of_code(name: str) -> None:
    text = read(name)
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1
    (code,) = blocks(NAMED[name], "python")
    assert len(code.strip().splitlines()) <= 10


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_figures_of_the_landing_page_are_those_of_the_results(name: str) -> None:
    measured = plot_results.scores(read("docs/results.md"))
    caption = re.findall(r"^!\[.*full experts.*\]", read(name), re.MULTILINE)[0]
    shown = {contestant: f"{measured[contestant][0]:.1f}" for contestant in plot_results.SHOWN}
    assert re.findall(r"\d+\.\d", caption) == list(shown.values())
    assert f"keep {shown['twin, budget 0.06x']} % of their quality" in read(name)
    assert f"a static merge keeps {shown['task arithmetic']} %" in read(name)
    drawn = (ROOT / "docs/img/results.svg").read_text(encoding="utf-8")
    assert [figure for figure in shown.values() if f">{figure}<" not in drawn] == []
