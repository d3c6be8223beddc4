"""What inputs and answers need is looked at before any work: `plan` and `build` refuse the same in the same words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import tiny
from tests.tiny import Family
from twinmerge.errors import InputError
from twinmerge.jobs.build import build, open_plan
from twinmerge.jobs.plan import describe_twin
from twinmerge.jobs.preflight import checked
from twinmerge.merging.executor import MEMORY_BYTES, make_executor
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]
Spoil = Callable[[Path], Any]
WHOLE = {"rank": 64, "embeddings": "exclusive"}


def change(path: str, **settings: Any) -> Spoil:
    """Some keys of a JSON file, which need not be there."""

    def spoil(root: Path) -> None:
        content = json.loads((root / path).read_text()) if (root / path).exists() else {}
        (root / path).write_text(json.dumps(content | settings))

    return spoil


def other_words(root: Path) -> None:
    """A tokenizer with two words in each other's place, in a file that the base has not."""
    made = tiny.tokenizer()
    vocabulary = made.get_vocab()
    vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]
    content = json.loads(made.backend_tokenizer.to_str())
    content["model"]["vocab"] = vocabulary
    (root / "sms" / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(root / "base" / "tokenizer_config.json", root / "sms")


def headless(root: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(root / "sms")
    model.base_model.save_pretrained(root / "sms")


def vision(root: Path) -> None:
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    models(root, config, "ViTModel", "ViTForImageClassification")


def both(root: Path) -> None:
    towers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    texts = {**towers, "vocab_size": tiny.VOCABULARY, "eos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config=texts, vision_config={**towers, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    models(root, config, "CLIPModel", "CLIPModel")


def models(root: Path, config: Any, base: str, expert: str) -> None:
    shutil.rmtree(root / "base")
    for name, cls in {"base": base, **dict.fromkeys(tiny.EXPERTS, expert)}.items():
        tiny.seeded(getattr(transformers, cls), config).save_pretrained(root / name)
    tiny.tokenizer().save_pretrained(root / "base")


def rows(text: str) -> Spoil:
    return lambda root: (root / "sms.jsonl").write_text(f'{{"text": "{text}"}}\n' * 4)


REFUSED: dict[str, tuple[str, Spoil, dict[str, Any], str]] = {
    "no tokenizer": (
        "bert",
        lambda root: [path.unlink() for path in (root / "base").glob("tokenizer*")],
        {},
        "^base .*base has no tokenizer, and router data are rows of text",
    ),
    "damaged tokenizer": (
        "bert",
        change("base/tokenizer.json", model={"type": "Nonsense"}),
        {},
        "^.*base: its tokenizer cannot be read: data did not match any variant",
    ),
    "expert's damaged tokenizer": (
        "bert",
        lambda root: [tiny.tokenizer().save_pretrained(root / "sms"), (root / "sms/tokenizer.json").write_text("{")],
        {},
        "^.*sms.*tokenizer.json is not valid JSON",
    ),
    "layer beyond the last": ("bert", rows("w5"), {"router": {"features": "layer:50"}}, "layer 50 must be at most 2"),
    "positions that are not there": (
        "roberta",
        rows("w5"),
        {"max_length": 32},
        "^max_length: the model has positions for 31 tokens, found 32$",
    ),
    "words that nobody knows": ("bert", rows("foo bar"), {}, r"sms\.router_data: to the .* every token is \[UNK\]"),
    "no words at all": ("bert", rows(""), {}, r"sms\.router_data: to the .* texts are not a single token"),
    "another vocabulary": ("bert", other_words, {}, "'sms' has another vocabulary: token 'w5' is 5 in .* and 6 in"),
    "some without a head": ("bert", headless, {}, "'trec' has a head of its own, expert 'sms' has none; give all or n"),
    "images alone": (
        "bert",
        vision,
        {},
        "base .*base has no preprocessor_config.json, without which no image is read",
    ),
    "images of an unknown processor": (
        "bert",
        lambda root: [vision(root), change("base/preprocessor_config.json", image_processor_type="A")(root)],
        {},
        "base/preprocessor_config.json names no known processor: Unrecognized image processor in",
    ),
    "texts and images at once": (
        "bert",
        both,
        {},
        "base .* reads texts and images at once; a twin's inputs are rows of text, or of images",
    ),
    "masked language model": (
        "distilbert",
        change("sms/config.json", architectures=["DistilBertForMaskedLM"]),
        {},
        "expert 'sms' is a DistilBertForMaskedLM, whose output layer all experts share with the base",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plan_and_build_refuse_in_the_same_words(family: Get, tmp_path: Path, case: str) -> None:
    name, spoil, settings, words = REFUSED[case]
    made = Family(Path(shutil.copytree(family(name).root, tmp_path / "models")))
    spoil(made.root)
    recipe = made.recipe(**{"exclusive": WHOLE, **settings})
    with pytest.raises(InputError, match=words) as by_build:
        build(recipe, tmp_path / "twin")
    with pytest.raises(InputError) as by_plan:
        describe_twin(open_plan(recipe), MEMORY_BYTES, make_executor("serial"), tmp_path)
    assert str(by_build.value) == str(by_plan.value)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_words_that_are_mostly_unknown_are_noted(family: Get, tmp_path: Path) -> None:
    made = Family(Path(shutil.copytree(family("bert").root, tmp_path / "models")))
    rows("w5 foo bar")(made.root)
    assert checked(made.plan()).plan.notes == ("experts.sms.router_data: 67% of its tokens are unknown",)


def test_length_left_out_is_the_longest_that_an_expert_was_trained_on(family: Get, tmp_path: Path) -> None:
    made = Family(Path(shutil.copytree(family("bert").root, tmp_path / "models")))
    assert checked(made.plan()).plan.recipe.max_length is None  # the base's own limit is all that is said
    for name, length in {"trec": 8, "sms": 12, "ag": 6}.items():
        copy = tiny.tokenizer()
        copy.backend_tokenizer.enable_truncation(length)
        copy.save_pretrained(made.root / name)
        content = json.loads((made.root / name / "tokenizer.json").read_text())
        content["truncation"] = {"max_length": length, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
        (made.root / name / "tokenizer.json").write_text(json.dumps(content))
    build(made.recipe(exclusive=WHOLE), tmp_path / "twin")
    artifact = TwinArtifact.open(tmp_path / "twin")
    assert artifact.manifest.recipe.max_length == 12
    assert list(artifact.path.glob("experts/*/own")) == []  # the length alone is no way to read
    asked = checked(made.plan(max_length=7)).plan
    assert asked.recipe.max_length == 7
    assert set(asked.notes) == {
        "'trec' was trained on up to 8 tokens, inputs are cut at 7",
        "'sms' was trained on up to 12 tokens, inputs are cut at 7",
    }
