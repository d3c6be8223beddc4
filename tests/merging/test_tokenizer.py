"""Which tokenizer and chat template a merge by mergekit's recipe gets."""

import json
from pathlib import Path

import pytest

from tests.jobs.test_merge import models, recipe
from twinmerge.errors import InputError
from twinmerge.jobs.merge import MANIFEST, merge_models
from twinmerge.merging.tokenizer import template_of

__all__ = ["models"]
VOCABULARY = {"model": {"vocab": {"x": 0, "y": 1}}}


def merged(folder: Path, more: str, out: str = "out") -> Path:
    text = "merge_method: linear\nmodels: [{model: base}, {model: a}, {model: b}]\nparameters: {weight: 1}\n"
    merge_models(recipe(folder, text + more), folder / out)
    return folder / out


@pytest.fixture
def speaking(models: Path) -> Path:
    """Models of one vocabulary; `a` and `b` share a template, `a` writes it in the older place."""
    for name in ("base", "a", "b"):
        (models / name / "tokenizer.json").write_text(json.dumps({**VOCABULARY, "whose": name}))
    (models / "base" / "chat_template.jinja").write_text("{{ base }}")
    (models / "a" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ ours }}", "eos_token": "y"}))
    (models / "b" / "chat_template.jinja").write_text("{{ ours }}")
    return models


def whose(folder: Path) -> str:
    return str(json.loads((folder / "tokenizer.json").read_text())["whose"])


@pytest.mark.parametrize(
    ("more", "owner", "template"),
    [
        ("", "base", "{{ base }}"),
        ("tokenizer_source: base\n", "base", "{{ base }}"),
        ("tokenizer_source: union\n", "base", "{{ base }}"),
        ("tokenizer: {source: union}\n", "base", "{{ base }}"),
        ("tokenizer: {source: b}\n", "b", "{{ ours }}"),
        ("tokenizer_source: a\n", "a", "{{ ours }}"),
        ("chat_template: auto\n", "base", "{{ ours }}"),
        ("chat_template: '{% if x %}{% endif %}'\n", "base", "{% if x %}{% endif %}"),
        ("tokenizer: {source: a}\nchat_template: '{{ mine }}'\n", "a", "{{ mine }}"),
    ],
)
def test_tokenizer_and_template_are_those_that_the_recipe_names(
    speaking: Path, more: str, owner: str, template: str
) -> None:
    out = merged(speaking, more)
    assert whose(out) == owner
    assert template_of(out) == template
    config = out / "tokenizer_config.json"
    assert ("eos_token" in json.loads(config.read_text()) if config.exists() else False) == (owner == "a")


def test_the_default_of_several_templates_counts(speaking: Path) -> None:
    several = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": "{{ plain }}"}]
    (speaking / "a" / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert template_of(speaking / "a") == "{{ plain }}"
    (speaking / "a" / "tokenizer_config.json").write_text(json.dumps({"chat_template": several[:1]}))
    assert template_of(speaking / "a") is None


def test_models_without_templates_are_noted(models: Path) -> None:
    out = merged(models, "chat_template: auto\n")
    assert "no model has a chat template" in json.loads((out / MANIFEST).read_text())["notes"][-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("chat_template: chatml\n", "chat_template: must be auto or a Jinja template itself, found 'chatml'"),
        ("tokenizer: {source: base, tokens: {x: {source: a}}}\n", "tokenizer.tokens: input should be None"),
        ("tokenizer: {source: base}\ntokenizer_source: base\n", "either tokenizer or tokenizer_source"),
        ("tokenizer: {source: nowhere/at/all}\n", "nowhere/at/all"),
        ("tokenizer: {source: other}\n", "tokenizer: .* has another vocabulary: token 'x' is 0 in .*base.* and 5 in"),
    ],
)
def test_tokenizers_that_cannot_be_had_are_refused(speaking: Path, more: str, words: str) -> None:
    (speaking / "other").mkdir()
    (speaking / "other" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 5, "y": 1}}}))
    with pytest.raises(InputError, match=words):
        merged(speaking, more)
