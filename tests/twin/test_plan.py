"""The plan: what a build will do, and what it refuses from headers alone."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tiny import EXPERTS, GATE_ORDER, Family, kinds_of, rewrite
from twinmerge.errors import DataError, InputError, MismatchError, RecipeError
from twinmerge.hf.classes import LIBRARY
from twinmerge.hf.kinds import parameter_kinds
from twinmerge.twin.plan import make_plan

Get = Callable[[str], Family]


@pytest.fixture
def bert(family: Get, tmp_path: Path) -> Family:
    """A copy that a test may damage."""
    return Family(shutil.copytree(family("bert").root, tmp_path / "bert"))


# ---- what it holds


def test_one_task_a_parameter_with_all_experts_in_the_order_of_the_gate(bert: Family) -> None:
    plan = bert.plan()
    assert plan.expert_names == GATE_ORDER
    assert [task.name for task in plan.tasks] == sorted(plan.base.specs)
    assert all(task.experts == GATE_ORDER and task.exclusive for task in plan.tasks)


def test_embeddings_are_left_to_the_shared_expert_unless_asked_for(bert: Family) -> None:
    for choice, expected in (("shared", False), ("exclusive", True)):
        tasks = bert.plan(exclusive={"rank": 4, "embeddings": choice}).tasks
        assert {task.exclusive for task in tasks if task.kind == "embedding"} == {expected}
        assert {task.exclusive for task in tasks if task.kind != "embedding"} == {True}


def test_matrix_shape_is_out_by_everything_else(bert: Family) -> None:
    shapes = {task.name: task.matrix_shape for task in bert.plan().tasks}
    assert shapes["encoder.layer.0.intermediate.dense.weight"] == (32, 16)
    assert shapes["pooler.dense.bias"] == (16, 1)


def test_what_no_layer_gates_is_merged_and_not_exclusive(bert: Family) -> None:
    kinds = {**kinds_of(bert.base), "pooler.dense.weight": "static"}
    task = next(
        task
        for task in make_plan(bert.recipe(exclusive={"rank": 4}), LIBRARY, lambda _: kinds).tasks
        if task.name == "pooler.dense.weight"
    )
    assert (task.experts, task.exclusive) == (GATE_ORDER, False)


def test_integer_buffers_are_copied_and_those_of_older_files_left_out(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    family = tiny.make_family(
        tmp_path, tiny.seeded(transformers.ResNetModel, config), transformers.ResNetForImageClassification
    )
    for number, name in enumerate(EXPERTS):  # a counter differs by nature
        rewrite(
            family.root / name / "model.safetensors",
            lambda t, number=number: {k: v + number if "num_batches" in k else v for k, v in t.items()},
        )
    rewrite(family.base / "model.safetensors", lambda t: {**t, "embeddings.position_ids": torch.arange(32)[None]})
    tasks = {task.name: task for task in family.plan().tasks}
    counter = tasks["embedder.embedder.normalization.num_batches_tracked"]
    assert (counter.kind, counter.experts, counter.exclusive) == ("static", (), False)
    assert "embeddings.position_ids" not in tasks


def test_parameter_that_no_expert_has_is_copied(bert: Family) -> None:
    for name in EXPERTS:
        tiny.seeded(
            transformers.BertForTokenClassification,
            transformers.BertConfig.from_pretrained(bert.root / name),
        ).save_pretrained(bert.root / name)  # has no pooler
    tasks = {task.name: task for task in bert.plan().tasks}
    assert (tasks["pooler.dense.weight"].experts, tasks["pooler.dense.weight"].exclusive) == ((), False)


def test_parameter_that_some_experts_do_without_is_merged_of_the_others(bert: Family) -> None:
    config = transformers.BertConfig.from_pretrained(bert.root / "sms")
    tiny.seeded(transformers.BertForTokenClassification, config).save_pretrained(bert.root / "sms")
    tasks = {task.name: task for task in bert.plan().tasks}
    assert (tasks["pooler.dense.weight"].experts, tasks["pooler.dense.weight"].exclusive) == (("ag", "trec"), True)


def test_order_of_experts_in_the_recipe_changes_nothing(bert: Family) -> None:
    forward, backward = bert.plan(), Family(bert.root, EXPERTS[::-1]).plan()
    assert forward.tasks == backward.tasks
    assert forward.expert_names == backward.expert_names


# ---- bytes


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_header_bytes_are_an_upper_bound_of_what_a_file_takes(family: Get, tmp_path: Path, name: str) -> None:
    for task in family(name).plan().tasks:
        stored = f"base_model.model.{task.name.removesuffix('.weight')}.lora_embedding_A"
        save_file({stored: torch.zeros(task.spec.shape)}, tmp_path / "one.safetensors")
        header = int.from_bytes((tmp_path / "one.safetensors").read_bytes()[:8], "little")
        assert header + 24 <= task.header_bytes  # and twelve more digits in each offset


def test_budget_is_what_is_left_after_vectors_and_headers(bert: Family) -> None:
    plan = bert.plan(exclusive={"budget": 3.0, "dtype": None})
    vectors = [task for task in plan.tasks if task.kind == "vector"]
    assert plan.vector_bytes == sum((task.spec.nbytes + task.header_bytes) * 3 for task in vectors)
    assert plan.budget_bytes is not None
    assert 0 < plan.budget_bytes < 3 * plan.base.nbytes - plan.vector_bytes
    assert bert.plan().budget_bytes is None


def test_budget_too_small_for_norms_and_biases_names_the_smallest_that_would_do(bert: Family) -> None:
    with pytest.raises(RecipeError, match=r"^exclusive\.budget: 0\.06 x [\d,]+ bytes cannot hold the biases") as caught:
        bert.plan(exclusive={"budget": 0.06})
    least = float(re.findall(r"at least ([\d.]+)$", str(caught.value))[0])
    assert bert.plan(exclusive={"budget": least}).budget_bytes >= 0
    with pytest.raises(RecipeError, match=r"exclusive\.budget"):
        bert.plan(exclusive={"budget": least - 2e-4})


# ---- what it refuses


def test_settings_that_do_not_fit_the_experts_are_refused(family: Get) -> None:
    words = r"^shared: density must be one number, or one for every expert \(ag, sms, trec\); 'ag' has none"
    with pytest.raises(RecipeError, match=words):
        family("bert").plan(shared={"method": "ties", "density": {"sms": 0.1, "trec": 0.2}})


def test_missing_model_is_named_with_its_key(bert: Family) -> None:
    shutil.rmtree(bert.root / "sms")
    with pytest.raises(RecipeError, match=r"^experts\.sms\.model: no file or folder .*sms; paths start from"):
        bert.plan()


def test_missing_router_data_is_named_with_its_key(bert: Family) -> None:
    (bert.root / "ag.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"^experts\.ag\.router_data: no file or folder .*ag\.jsonl"):
        bert.plan()


def test_empty_router_data_is_named(bert: Family) -> None:
    (bert.root / "ag.jsonl").write_text("")
    with pytest.raises(DataError, match=r"^experts\.ag\.router_data: .*ag\.jsonl is empty; the router needs inputs"):
        bert.plan()


def test_tensors_of_the_base_that_its_class_does_not_have_are_left_out_with_a_note(bert: Family) -> None:
    rewrite(bert.base / "model.safetensors", lambda t: {**t, "cls.a": torch.zeros(3), "cls.b": torch.zeros(3)})
    plan = bert.plan()
    assert plan.notes == ("base: 'cls.a' and 1 more are left out, which a BertModel does not use here",)
    assert not any("cls" in task.name for task in plan.tasks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layer.1.output.dense" not in k},
            r"base .* lacks 2 parameters of BertModel, first 'encoder\.layer\.1\.output\.dense\.bias'",
        ),
        (
            lambda t: {**t, "embeddings.word_embeddings.weight": torch.zeros(70, 16)},
            r"base .*: 'embeddings\.word_embeddings\.weight' has shape \[70, 16\], by config\.json it must be \[64",
        ),
    ],
)
def test_base_that_its_class_would_not_load_is_named(
    bert: Family, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    rewrite(bert.base / "model.safetensors", change)
    with pytest.raises(MismatchError, match=message):
        bert.plan()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["NoSuchModel"]},
            r"config\.json must name a transformers class in architectures, found \['NoSuch",
        ),
        ({"architectures": None}, "config.json must name a transformers class in architectures, found none"),
        ({"model_type": "no-such-type"}, "must be a transformers model folder: "),
    ],
)
def test_base_of_no_known_class_is_named(bert: Family, config: dict[str, object], message: str) -> None:
    path = bert.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(MismatchError, match=message) as caught:
        parameter_kinds(bert.base)
    assert "\n" not in str(caught.value)


def test_base_without_config_is_named(bert: Family) -> None:
    (bert.base / "config.json").unlink()
    with pytest.raises(MismatchError, match="must be a transformers model folder"):
        parameter_kinds(bert.base)


def test_everything_refused_is_a_fault_of_the_input() -> None:
    assert {error.exit_code for error in (RecipeError, MismatchError, DataError)} == {InputError.exit_code} == {2}


def test_no_weight_is_read_for_a_plan(bert: Family) -> None:
    for folder in ("base", *EXPERTS):
        path = bert.root / folder / "model.safetensors"
        size = path.stat().st_size
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        with path.open("r+b") as file:  # the data is garbage
            file.seek(header)
            file.write(b"\xff" * (size - header))
    assert bert.plan().tasks
    assert load_file(bert.base / "model.safetensors")["pooler.dense.bias"].isnan().all()
