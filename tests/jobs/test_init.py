"""`twinmerge init`: a recipe that says what was found, what is missing, and that builds once nothing is."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tiny import EXPERTS, Family
from twinmerge.cli import main
from twinmerge.errors import MismatchError, RecipeError
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build, open_plan
from twinmerge.jobs.init import draft_recipe
from twinmerge.jobs.predict import predict
from twinmerge.twin.artifact import TwinArtifact


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return tiny.make_family(tmp_path, tiny.bert(), transformers.BertForSequenceClassification)


def words(family: Family, *names: str) -> list[str]:
    return [str(family.root / name) for name in names]


def adapter(family: Family, name: str, *, head: bool = True, labels: int = 3) -> None:
    """A LoRA classifier on the base, in the place of an expert."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(family.base, num_labels=labels)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    shutil.rmtree(family.root / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about transformers
        get_peft_model(model, config).save_pretrained(family.root / name)
    if not head:
        file = family.root / name / "adapter_model.safetensors"
        tensors = load_file(file)
        whole = {k: v for k, v in tensors.items() if "classifier" in k}
        save_file({k: v for k, v in tensors.items() if k not in whole}, file)
        save_file(
            {f"classifier.{k.rpartition('.')[2]}": v for k, v in whole.items()},
            family.root / f"{name}-head.safetensors",
        )
        settings = json.loads((family.root / name / "adapter_config.json").read_text())
        (family.root / name / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": None}))


def test_draft_of_whole_models_is_a_recipe_that_builds(
    family: Family, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family.root)
    assert main(["init", "base", *EXPERTS]) == 0
    text = capsys.readouterr().out
    recipe = yaml.safe_load(text)
    assert recipe["base"] == "base"
    assert recipe["experts"] == {n: {"model": n, "router_data": f"{n}.jsonl"} for n in EXPERTS}
    assert "# BertForSequenceClassification, labels LABEL_0, LABEL_1" in text
    assert "exclusive.budget" in text.splitlines()[1]  # the tiny model's one refusal
    (family.root / "recipe.yaml").write_text(text.replace("budget: 0.06", "budget: 3"))
    assert main(["build", "recipe.yaml", "--out", "twin"]) == 0


def test_what_is_missing_is_said_in_its_place(family: Family) -> None:
    (family.root / "sms.jsonl").unlink()
    text = draft_recipe(words(family, "base", *EXPERTS), root=family.root)
    assert "# missing: a file of inputs that belong to it" in text
    assert "experts.sms.router_data is missing" in text.splitlines()[1]
    alone = draft_recipe(words(family, "sms", "ag"), root=family.root)
    assert "# missing: the model that the experts were fine-tuned from" in alone
    assert "# missing: a twin needs two experts" in draft_recipe(words(family, "base", "sms"), root=family.root)


def test_base_may_be_named_or_be_what_an_adapter_names(family: Family) -> None:
    adapter(family, "sms")
    for text in (
        draft_recipe(words(family, "sms", "ag"), root=family.root),
        draft_recipe(words(family, "sms", "ag"), base=str(family.base), root=family.root),
    ):
        assert yaml.safe_load(text)["base"] == "base"
        assert "# PEFT adapter, LORA of rank 2" in text
        assert "# labels: [first, second]" in text
    settings = family.root / "sms/adapter_config.json"
    settings.write_text(settings.read_text().replace(str(family.base), "some/hub-model"))
    text = draft_recipe(words(family, "sms", "ag"), root=family.root)
    assert yaml.safe_load(text)["base"] == "some/hub-model"
    assert "named by an adapter" in text


def test_names_are_made_valid_and_different(family: Family) -> None:
    for place in ("x/model", "y/model", "z/1 odd+name"):
        shutil.copytree(family.root / "sms", family.root / place)
    text = draft_recipe(words(family, "x/model", "y/model", "z/1 odd+name"), base=str(family.base), root=family.root)
    assert list(yaml.safe_load(text)["experts"]) == ["model-1", "model-2", "1-odd-name"]
    assert yaml.safe_load(text)["experts"]["1-odd-name"]["model"] == "z/1 odd+name"


def test_what_is_no_model_is_refused(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    (family.root / "empty").mkdir()
    assert main(["init", str(family.root / "empty"), str(family.root / "sms")]) == 2
    assert "empty" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="no file or folder"):
        draft_recipe(words(family, "absent"), root=family.root)


# ---- what a recipe says of an expert


def test_labels_of_a_recipe_name_the_classes(family: Family, tmp_path: Path) -> None:
    adapter(family, "sms")
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in EXPERTS}
    experts["sms"]["labels"] = ["ham", "spam", "other"]  # type: ignore[assignment]
    twin = build(family.recipe(experts=experts, exclusive={"rank": 64}), tmp_path / "twin").path
    answers = list(predict(TwinModel.from_pretrained(twin), tiny.text_rows("sms"), expert="sms"))
    assert {answer["label"] for answer in answers} <= {"ham", "spam", "other"}
    recorded = TwinArtifact.open(twin).manifest.recipe.content()["experts"]["sms"]
    assert recorded["labels"] == ["ham", "spam", "other"]
    for wrong in (["ham", "spam"], ["ham", "spam", "spam"]):
        experts["sms"]["labels"] = wrong  # type: ignore[assignment]
        with pytest.raises(MismatchError, match="experts.sms.labels must be as many names as its head has classes"):
            open_plan(family.recipe(experts=experts, exclusive={"rank": 1}))


def test_head_that_an_adapter_lacks_may_lie_elsewhere(family: Family, tmp_path: Path) -> None:
    adapter(family, "sms", head=False)
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in EXPERTS}
    with pytest.raises(MismatchError, match="neither it nor the base holds; name a file that has it as experts.sms.he"):
        open_plan(family.recipe(experts=experts, exclusive={"rank": 1}))
    experts["sms"]["head"] = "sms-head.safetensors"
    twin = build(family.recipe(experts=experts, exclusive={"rank": 64, "embeddings": "exclusive"}), tmp_path / "twin")
    model = TwinModel.from_pretrained(twin.path)
    whole = load_file(family.root / "sms-head.safetensors")
    assert torch.equal(dict(model.heads["sms"].named_parameters())["classifier.weight"], whole["classifier.weight"])
    experts["ag"]["head"] = "sms-head.safetensors"
    with pytest.raises(MismatchError, match="experts.ag.head is for adapters without one"):
        open_plan(family.recipe(experts=experts, exclusive={"rank": 1}))


def test_head_beside_an_adapter_that_peft_merges_is_refused(family: Family) -> None:
    adapter(family, "sms", head=False)
    settings = json.loads((family.root / "sms/adapter_config.json").read_text())
    (family.root / "sms/adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in EXPERTS}
    experts["sms"]["head"] = "sms-head.safetensors"
    with pytest.raises(MismatchError, match="experts.sms.head is for plain LoRA adapters"):
        open_plan(family.recipe(experts=experts, exclusive={"rank": 1}))


def test_class_of_a_recipe_is_taken_where_an_adapter_names_none(family: Family) -> None:
    adapter(family, "sms")
    settings = json.loads((family.root / "sms/adapter_config.json").read_text())
    (family.root / "sms/adapter_config.json").write_text(json.dumps({**settings, "task_type": None}))
    experts = {name: {"model": name, "router_data": f"{name}.jsonl"} for name in EXPERTS}
    with pytest.raises(MismatchError):
        open_plan(family.recipe(experts=experts, exclusive={"rank": 1}))
    experts["sms"]["class"] = "BertForSequenceClassification"
    plan = open_plan(family.recipe(experts=experts, exclusive={"rank": 1}))
    assert plan.experts["sms"].head == ("classifier.bias", "classifier.weight")
