"""The report: one page that loads nothing, tables for the terminal and Markdown, and what they say."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scripts.fill_results import markdown_tables
from tests.eval.make_result import make_result
from twinmerge.eval.results import Interval, SuiteResult, read_result
from twinmerge.report.page import render_html, write_report
from twinmerge.report.tables import summary_sentences, terminal_table

VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def result(made: tuple[SuiteResult, Any]) -> SuiteResult:
    return made[0]


@pytest.fixture(scope="module")
def page(result: SuiteResult) -> str:
    return render_html(result)


class Page(HTMLParser):
    """Tags with attributes, the text, and whether every tag was closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def only(result: SuiteResult, *names: str) -> SuiteResult:
    """The result with these contestants alone, and nothing that a small suite may lack."""
    return SuiteResult(
        **{
            **{key: getattr(result, key) for key in SuiteResult.model_fields},
            "contestants": [one for one in result.contestants if one.name in names],
            "summaries": [one for one in result.summaries if one.name in names],
            "comparisons": [],
            "routers": [],
            "sources": [],
        }
    )


def with_scores(result: SuiteResult, **scores: tuple[float, float, float]) -> SuiteResult:
    """The result with other routed scores of some contestants (underscores for hyphens)."""
    routed = {
        name.replace("_", "-"): Interval(value=value, low=low, high=high) for name, (value, low, high) in scores.items()
    }
    summaries = [
        one.model_copy(update={"normalized_routed": routed.get(one.name, one.normalized_routed)})
        for one in result.summaries
    ]
    return result.model_copy(update={"summaries": summaries})


# --- the page ----------------------------------------------------------------------------------------------------


def test_page_is_well_formed(page: str) -> None:
    assert Page(page).open == []


def test_page_loads_nothing_from_anywhere(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in {"img", "iframe", "object", "embed", "base", "source"}
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert re.findall(r"url\((?!#)", page) == []
    assert not re.search(r"https?:|@import|fetch\(|XMLHttpRequest", page)


def test_page_shows_every_contestant_with_its_scores(result: SuiteResult, page: str) -> None:
    text = Page(page).text
    for one in result.summaries:
        shown = one.normalized_oracle_head
        assert one.title in text
        assert f"{100 * shown.value:.1f} {100 * shown.low:.1f} to {100 * shown.high:.1f}" in text


def test_page_shows_every_task_router_unseen_task_and_source(result: SuiteResult, page: str) -> None:
    text = Page(page).text
    wanted = [*result.tasks, *result.summaries[0].unseen, *result.sources, result.environment.commit]
    wanted += [one.features for one in result.routers]
    assert [one for one in wanted if one not in text] == []


def test_ids_of_the_page_are_unique_and_its_links_lead_somewhere(page: str) -> None:
    tags = Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert len(ids) == len(set(ids))
    assert links <= {f"#{one}" for one in ids}


def test_contestants_have_their_name_at_their_point(result: SuiteResult, page: str) -> None:
    assert page.count("<g><title>Twin, rank 4 at 0.101x: routed ") == 4  # point and bar, both protocols
    assert "contestant-" not in page


def test_every_plot_says_in_words_what_it_shows(result: SuiteResult, page: str) -> None:
    plots = [attributes for tag, attributes in Page(page).tags if tag == "svg"]
    assert len(plots) == 3
    assert all(one["role"] == "img" for one in plots)
    assert f"Twin, rank 4 at 0.101x: routed {100 * _summary(result, 'twin-rank-4'):.1f}" in str(plots[0]["aria-label"])


def _summary(result: SuiteResult, name: str) -> float:
    routed = next(one for one in result.summaries if one.name == name).normalized_routed
    assert routed is not None
    return routed.value


def test_plots_follow_the_colours_of_the_page(page: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert [re.findall(r"(?:fill|stroke): #\w+", one) for one in plots] == [[], [], []]
    assert all("var(--kind-twin)" in one for one in plots)


def test_titles_and_sources_are_text_never_markup(result: SuiteResult) -> None:
    nasty = '<script>alert("$x$")</script>'
    summaries = [one.model_copy(update={"title": nasty + one.name}) for one in result.summaries]
    page = render_html(result.model_copy(update={"summaries": summaries, "sources": [nasty], "suite": nasty}))
    assert "<script>alert" not in page
    assert nasty in Page(page).text


def test_same_result_gives_the_same_page(result: SuiteResult, page: str) -> None:
    assert render_html(result) == page


def test_page_without_a_twin_says_so(result: SuiteResult) -> None:
    text = Page(render_html(only(result, "pretrained", "ties"))).text
    assert "2 contestants on 3 tasks; no twin among them." in text
    assert "Router" not in text


def test_page_without_any_router_shows_the_oracle_head_alone(result: SuiteResult) -> None:
    text = Page(render_html(only(result, "experts"))).text
    assert "Normalized score, oracle head" in text
    assert "Normalized score, routed" not in text


def test_page_of_one_seed_has_no_table_of_seeds() -> None:
    result, _ = make_result(seeds=(0,), rows=20, tasks=("trec",), resamples=5)
    page = render_html(result)
    assert "Each seed" not in page
    assert "over 1 seeds" not in page
    assert "### Seeds" not in markdown_tables(result)


def test_plots_come_before_the_long_tables_and_the_paired_differences_last(page: str) -> None:
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    tables = {match[1]: match.start() for match in re.finditer(r'role="region" aria-label="([^"]*)"><table', text)}
    score, task, calibration = (match.start() for match in re.finditer("<svg", text))
    by_task = [place for name, place in tables.items() if name.startswith("Normalized score by task")]
    assert max(score, task) < min(by_task)
    assert calibration < min(tables["Routers"], tables["Mean gate of each expert"])
    assert tables["Paired differences"] == max(tables.values())


def test_report_is_two_files(result: SuiteResult, tmp_path: Path) -> None:
    path = write_report(result, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert sorted(one.name for one in path.parent.iterdir()) == ["report.html", "results.json"]
    assert read_result(path.parent / "results.json") == result
    assert json.loads((path.parent / "results.json").read_text())["suite"] == "text-8"


# --- the summary -------------------------------------------------------------------------------------------------


def test_summary_names_the_smallest_twin_that_reaches_the_best_score(result: SuiteResult) -> None:
    some = only(result, "twin-0.03", "twin-0.06", "twin-rank-16")
    far, near, best = (0.950, 0.940, 0.960), (0.970, 0.965, 0.976), (0.975, 0.970, 0.980)
    scored = with_scores(some, **{"twin_0.03": far, "twin_0.06": near, "twin_rank_16": best})
    assert summary_sentences(scored)[0] == (
        "Twin, budget 0.06x keeps 97.0 % of its experts' quality over 3 tasks with no task ID "
        "(95 % interval 96.5 to 97.6), storing 0.060x of the base model's bytes beside one shared model."
    )


def test_summary_states_the_difference_to_the_best_static_merge(result: SuiteResult) -> None:
    scored = with_scores(result, **{"twin_0.12": (0.99, 0.98, 1.0)})
    best = max(
        (one for one in result.summaries if one.kind == "static"),
        key=lambda one: one.normalized_routed.value,  # type: ignore[union-attr]
    )
    sentence = next(one for one in summary_sentences(scored) if "static merge" in one)
    assert sentence.startswith(f"The best static merge, {best.title}, keeps ")
    assert re.search(r" %: a difference of \d+\.\d \[\d+\.\d, \d+\.\d\] points\.$", sentence)


def test_summary_without_a_comparison_states_the_scores_alone(result: SuiteResult) -> None:
    sentences = summary_sentences(only(result, "twin-0.06", "ties"))
    assert re.fullmatch(r"The best static merge, TIES, keeps \d\d\.\d %\.", sentences[1])


def test_summary_of_a_twin_without_a_router_says_that_the_head_is_given(result: SuiteResult) -> None:
    some = only(result, "twin-0.06", "ties")
    bare = [one.model_copy(update={"normalized_routed": None, "confusion": None}) for one in some.summaries]
    sentences = summary_sentences(some.model_copy(update={"summaries": bare}))
    assert "with the head of each task given" in sentences[0]
    assert len(sentences) == 3


# --- tables ------------------------------------------------------------------------------------------------------


def test_terminal_table_has_a_row_for_every_contestant(result: SuiteResult) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal_table(result))
    text = console.export_text()
    for one in result.summaries:
        line = next(line for line in text.splitlines() if one.title in line)
        assert f"{100 * one.normalized_oracle_head.value:.1f} ±" in line
        assert ("– " in line) == (one.normalized_routed is None)


def test_terminal_table_keeps_every_figure_whole_at_80_columns(result: SuiteResult) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(result))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for one in result.summaries:
        shown = one.normalized_oracle_head
        figure = f"{100 * shown.value:.1f} ±{50 * (shown.high - shown.low):.1f}"
        line = next(line for line in lines if figure in line and f"{one.ms_per_input:.2f}" in line)
        assert line.strip().startswith(one.title.split()[0]), "titles have room"


def test_markdown_tables_are_rectangular(result: SuiteResult) -> None:
    blocks = [block.splitlines() for block in markdown_tables(result).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 7  # contestants, two protocols, seeds, differences, routers, unseen
    for block in blocks:
        assert set(block[1]) <= set("| -")
        assert len({line.count("|") for line in block}) == 1


def test_markdown_shows_normalized_scores_times_100(result: SuiteResult) -> None:
    line = next(line for line in markdown_tables(result).splitlines() if line.startswith("| Twin, rank 4 | twin"))
    assert f"| {100 * _summary(result, 'twin-rank-4'):.1f} [" in line


def test_markdown_escapes_what_would_end_a_cell(result: SuiteResult) -> None:
    some = only(result, "ties")
    some = some.model_copy(update={"summaries": [some.summaries[0].model_copy(update={"title": "a|b\nc"})]})
    assert "| a\\|b c | static merge |" in markdown_tables(some)


def test_importing_the_report_imports_no_plotting_and_no_templates() -> None:
    heavy = "('matplotlib', 'jinja2', 'rich', 'torch', 'transformers')"
    code = f"import sys, twinmerge.report.page; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
