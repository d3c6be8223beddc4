"""Bad input through the real command line: exit code 2, one line on stderr with the right words, nothing written.

`pytest tests/test_bad_input.py -v` lists what was tried.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.jobs.test_build import (
    BAD,
    LAYER,
    nan_in,
    recipe_text,
    recipe_with,
    replace_tensors,
    text,
    unrelated,
    without,
    write_recipe,
)
from twinmerge.cli import main

Damage = Callable[[tiny.Family], Any]


def distilbert_base(family: tiny.Family) -> None:
    shutil.rmtree(family.base)
    tiny.distilbert().save_pretrained(family.base)
    tiny.tokenizer().save_pretrained(family.base)


def names_differ_in_case(family: tiny.Family) -> None:
    sources = {name: {"model": "sms", "router_data": "sms.jsonl"} for name in ("sms", "SMS")}
    write_recipe(family, experts=sources)


def output_exists(family: tiny.Family) -> None:
    (family.root / "out").mkdir()
    (family.root / "out" / "mine.txt").write_text("mine")


CASES: dict[str, tuple[Damage, str]] = {
    "unknown key with a typo": (
        recipe_text("exclusive:\n", "exclusive:\n  densty: 0.2\n"),
        r"recipe\.yaml:13: unknown key 'densty' under exclusive; did you mean 'density'\?",
    ),
    "missing recipe": (lambda f: (f.root / "recipe.yaml").unlink(), r"recipe\.yaml cannot be read: .*No such file"),
    "missing base": (
        lambda f: shutil.rmtree(f.base),
        r"base: no file or folder .*/base; paths start from the recipe's",
    ),
    "missing expert": (lambda f: shutil.rmtree(f.root / "sms"), r"experts\.sms\.model: no file or folder .*/sms;"),
    "missing weights": (
        lambda f: (f.root / "sms" / "model.safetensors").unlink(),
        r"sms has neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "missing router data": (
        lambda f: (f.root / "sms.jsonl").unlink(),
        r"experts\.sms\.router_data: no file or folder .*sms\.jsonl",
    ),
    "wrong base: different architecture": (
        distilbert_base,
        r"expert 'trec' is a 'bert' model, the base is 'distilbert'; experts must be fine-tuned from the base",
    ),
    "wrong base: same architecture, unrelated weights": (
        replace_tensors("base", unrelated),
        r"expert '\w+' is no fine-tune of this base: the cosine of their matrices must be at least 0\.5, found -?0\.",
    ),
    "wrong expert: same architecture, unrelated weights": (
        replace_tensors("sms", unrelated),
        r"expert 'sms' is no fine-tune of this base: the cosine of their matrices must be at least 0\.5, found -?0\.",
    ),
    "missing tensor in an expert": (
        replace_tensors("sms", without(LAYER)),
        r"expert 'sms' lacks 1 of 41 parameters, first 'encoder\.layer\.0\.output\.dense\.weight'; was it fine-tuned",
    ),
    "NaN in an expert": (
        replace_tensors("sms", nan_in(LAYER)),
        r"expert 'sms': 'bert\.encoder\.layer\.0\.output\.dense\.weight' in .* has 1 NaN or Inf values",
    ),
    "NaN in an expert's embeddings": (
        replace_tensors("sms", nan_in("bert.embeddings.word_embeddings.weight")),
        r"expert 'sms': 'bert\.embeddings\.word_embeddings\.weight' in .* has 1 NaN or Inf values, first at index",
    ),
    "NaN in an expert's head": (
        replace_tensors("sms", nan_in("classifier.bias")),
        r"expert 'sms': 'classifier\.bias' in .* has 1 NaN or Inf values, first at index \(2,\)",
    ),
    "empty router data": (
        text("ag.jsonl", ""),
        r"experts\.ag\.router_data: .*ag\.jsonl is empty; the router needs inputs",
    ),
    "single expert": (
        recipe_with(experts={"sms": {"model": "sms", "router_data": "sms.jsonl"}}),
        r"recipe\.yaml:2: experts: a twin needs at least two experts, found 1",
    ),
    "two experts with the same name": (
        recipe_text("  sms:\n", "  trec:\n"),
        r"recipe\.yaml:6: key 'trec' stands twice, first on line 3; names must differ",
    ),
    "two experts whose names differ only in case": (
        names_differ_in_case,
        r"recipe\.yaml:\d+: experts: experts' names must differ in more than case",
    ),
    "negative rank": (
        recipe_with(exclusive={"rank": -1}),
        r"recipe\.yaml:\d+: exclusive\.rank: input should be greater than or equal to 0, found -1",
    ),
    "fractional rank": (
        recipe_with(exclusive={"rank": 1.5}),
        r"recipe\.yaml:\d+: exclusive\.rank: input should be a valid integer, found 1\.5",
    ),
    "budget of 0": (
        recipe_with(exclusive={"budget": 0}),
        r"recipe\.yaml:\d+: exclusive\.budget: input should be greater than 0, found 0",
    ),
    "output folder that exists": (output_exists, r"/out exists already; choose another path, or overwrite it"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tiny.Family:
    root = tmp_path_factory.mktemp("good")
    return tiny.make_family(root, tiny.bert(), tiny.transformers.BertForSequenceClassification)


def build(family: tiny.Family, damage: Damage, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Build from damaged input; returns the lines of stderr once it is sure that nothing was written."""
    write_recipe(family)
    damage(family)
    before = {path: path.stat().st_mtime_ns for path in family.root.rglob("*")}
    assert main(["build", str(family.root / "recipe.yaml"), "--out", str(family.root / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert {path: path.stat().st_mtime_ns for path in family.root.rglob("*")} == before
    return captured.err.splitlines()


@pytest.mark.parametrize("case", CASES)
def test_build_refuses(case: str, good: tiny.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = CASES[case]
    lines = build(tiny.Family(shutil.copytree(good.root, tmp_path / "family")), damage, capsys)
    assert len(lines) == 1
    assert re.match(rf"twinmerge: error: .*{words}", lines[0]), lines[0]


@pytest.mark.parametrize("case", sorted(BAD))
def test_build_complains_in_one_line_of_whatever_the_library_refuses(
    case: str, good: tiny.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of it shows only after stages of work, each of which is a line of its own."""
    lines = build(tiny.Family(shutil.copytree(good.root, tmp_path / "family")), BAD[case][0], capsys)
    assert sum(line.startswith("twinmerge: error: ") for line in lines) == 1
    assert lines[-1].startswith("twinmerge: error: ")


def test_the_same_input_undamaged_is_built(
    good: tiny.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = tiny.Family(shutil.copytree(good.root, tmp_path / "family"))
    torch.manual_seed(0)
    assert main(["build", str(write_recipe(family)), "--out", str(family.root / "out")]) == 0
    assert "a twin of 3 experts" in " ".join(capsys.readouterr().out.split())
