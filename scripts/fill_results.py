"""Writes the measured tables of a suite's results.json into docs/results.md, between its markers."""

import argparse
import re
from pathlib import Path

from twinmerge.eval.results import read_result
from twinmerge.report.tables import markdown_tables

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
BLOCK = re.compile(r"(<!-- generated: tables -->\n).*?(<!-- end of generated -->)", re.DOTALL)


def main() -> None:
    """Replace the block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of `twinmerge eval suites/text/text8.yaml`")
    result = read_result(parser.parse_args().results)
    setting = (
        f"Suite `{result.suite}`, base {result.base}, seeds {', '.join(map(str, result.seeds))}; commit "
        f"`{result.environment.commit}`, {result.environment.date}, {result.environment.machine}, "
        f"{result.environment.threads} thread(s); "
        + ", ".join(f"{name} {version}" for name, version in result.environment.versions.items())
        + f"; {result.resamples:,} bootstrap resamples."
    )
    tables = markdown_tables(result)
    page, count = BLOCK.subn(lambda match: f"{match[1]}\n{setting}\n\n{tables}\n{match[2]}", PAGE.read_text("utf-8"))
    if count != 1:
        parser.error(f"{PAGE} must hold the markers of the generated block once, found {count}")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
