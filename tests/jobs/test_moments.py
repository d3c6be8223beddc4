"""What directions are weighed by: moments of real layers, by hand and in builds, and where they cannot be measured."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import reference, tiny
from tests.tiny import EXPERTS, Family, adapter_family
from tests.walk.small import inputs_for, small_model
from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.hf.answers import CONTINUATION
from twinmerge.hf.inputs import tokenize
from twinmerge.hf.measurements import Subject, moments
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.grow import add
from twinmerge.jobs.measure import for_weighting
from twinmerge.jobs.preflight import checked
from twinmerge.tensors.int4 import FourBits
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.plan import moment_bytes, weighted
from twinmerge.twin.weighting import LEFT, RIGHT, SIZES, Weighting

ROWS = 3
TOKENS = {"router": {"features": "tokens"}}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base with a head, and fine-tunes of it with that head."""
    root = tmp_path_factory.mktemp("classifiers")
    config = tiny.text_config(transformers.BertConfig, num_labels=3)
    base = tiny.seeded(transformers.BertForSequenceClassification, config)
    return tiny.make_family(root, base, type(base), scale=0.1)


def measured(made: Family, name: str, *, most_bytes: int = 10**9, **exclusive: Any) -> dict[str, Tensor]:
    settings = {"rank": 2, "weighting": "two_sided", "weighting_rows": ROWS, **exclusive}
    found = for_weighting(checked(made.plan(exclusive=settings)), 2 * most_bytes)
    assert found is not None
    subject = found.load(name)
    inputs = [tokenize(subject.model, [row]) for row in found.rows[name]]
    assert len(inputs) == ROWS
    return {n: tensor for portion in found.measures(subject, inputs) for n, tensor in portion.items()}


def subject_of(made: Family, name: str) -> tuple[Subject, list[dict[str, Tensor]]]:
    found = for_weighting(checked(made.plan(exclusive={"rank": 1, "weighting": "inputs", "weighting_rows": ROWS})), 1)
    assert found is not None
    subject = found.load(name)
    return subject, [tokenize(subject.model, [row]) for row in found.rows[name]]


def test_inputs_are_the_second_moment_of_what_a_layer_reads(classifiers: Family) -> None:
    found = measured(classifiers, "sms")
    subject, rows = subject_of(classifiers, "sms")
    seen: list[Tensor] = []
    layer = "encoder.layer.1.intermediate.dense"
    subject.model.backbone.base_model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].detach().double())
    )
    for row in rows:
        subject.logits(row)
    x = torch.cat(seen)
    (name,) = (n for n in found if n.endswith(f"{layer}.weight{RIGHT}"))
    assert torch.allclose(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert float(found[name].diagonal().mean()) == pytest.approx(float(x.square().mean()), rel=1e-4)


def test_gradients_are_those_of_a_flattened_fisher_information(classifiers: Family) -> None:
    """By hand: over all classes instead of drawn directions; many drawings of one row come near it."""
    subject, rows = subject_of(classifiers, "sms")
    layer = "encoder.layer.1.output.dense"
    backbone: Any = subject.model.backbone
    kept: list[Tensor] = []
    hook = backbone.base_model.get_submodule(layer).register_forward_hook(
        lambda _, args, out: (kept.append(out.requires_grad_()), out.clone())[1]
    )
    backbone.requires_grad_(False)
    logits = subject.logits(rows[0])[0]
    hook.remove()
    slopes = torch.stack(
        [torch.autograd.grad(logit, kept[0], retain_graph=True)[0][0] for logit in logits]
    ).double()  # (class, token, out)
    p = (logits.detach() / 4).softmax(-1).double()
    information = torch.diag(p) - torch.outer(p, p)
    expected = torch.einsum("kto,kl,ltp->op", slopes, information, slopes)
    (name,) = (n for n in subject.names if n.endswith(f"{layer}.weight"))
    one = Subject("sms", subject.model, subject.answers, {name: subject.names[name]})
    (found,) = moments(one, [rows[0]] * 3000, gradients=True, seed=0, most_bytes=1)
    assert torch.allclose(found[name + LEFT].double(), expected, rtol=0.15, atol=0.1 * float(expected.abs().max()))


def test_moments_that_do_not_fit_together_are_the_same_in_portions(classifiers: Family) -> None:
    whole, portions = (measured(classifiers, "trec", most_bytes=most) for most in (10**9, 1))
    assert whole.keys() == portions.keys()
    assert all(torch.equal(tensor, portions[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("weighting", ["inputs", "two_sided"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_twin_keeps_the_best_directions_by_what_was_measured(
    family: Any, tmp_path: Path, architecture: str, weighting: str
) -> None:
    made: Family = family(architecture)
    exclusive = {"rank": 2, "weighting": weighting, "weighting_rows": ROWS, "embeddings": "exclusive"}
    build(made.recipe(exclusive=exclusive, **TOKENS), tmp_path / "twin")
    artifact = TwinArtifact.open(tmp_path / "twin")
    found = checked(made.plan(exclusive=exclusive))
    calibration = for_weighting(found, 10**9)
    assert calibration is not None
    for expert in EXPERTS:
        subject = calibration.load(expert)
        inputs = [tokenize(subject.model, [row]) for row in calibration.rows[expert]]
        known = {n: t for portion in calibration.measures(subject, inputs) for n, t in portion.items()}
        parts = artifact.exclusive(expert)
        weighed = 0
        for task in weighted(found.plan):
            base = found.plan.base.read(task.name)
            difference = found.plan.experts[expert].task_vector(task.name, base) + base
            difference = (difference - artifact.shared.read(task.name)).flatten(1)
            sides = [known.get(task.name + side) for side in (LEFT, RIGHT)]
            if sides == [None, None]:
                continue
            weighed += 1
            left, right = (torch.ones(n) if s is None else s for s, n in zip(sides, difference.shape, strict=True))
            expected = reference.weighed_low_rank(difference, left, right, 2)
            assert torch.allclose(parts[task.name].dense().double(), expected, atol=1e-4)
        assert weighed >= 8


def test_adapters_are_weighed_without_forming_a_matrix_and_come_out_whole_at_full_rank(tmp_path: Path) -> None:
    made, merged = adapter_family(tmp_path / "family")
    exclusive = {"rank": 64, "weighting": "two_sided", "weighting_rows": ROWS, "embeddings": "exclusive"}
    build(made.recipe(shared={"method": "average"}, exclusive=exclusive, **TOKENS), tmp_path / "twin")
    twin = TwinModel.from_pretrained(tmp_path / "twin")
    for name, expert in merged.items():
        inputs = tokenize(twin, [{"text": "hello world"}])
        with torch.no_grad():
            (logits,) = twin.answer(twin.encode(twin.one_hot([name]), **inputs), [name], **inputs)
            assert torch.allclose(logits, expert(**inputs).logits[0], atol=1e-4)


def test_a_budget_takes_four_bits_and_weighs_them(family: Any, tmp_path: Path) -> None:
    made: Family = family("bert")
    build(made.recipe(exclusive={"budget": 2.0}, **TOKENS), tmp_path / "twin")
    artifact = TwinArtifact.open(tmp_path / "twin")
    kept = artifact.manifest.recipe.exclusive.content()
    assert (kept["dtype"], kept["weighting"]) == ("int4", "two_sided")
    specs = Checkpoint.open(tmp_path / "twin" / "experts" / "sms" / "exclusive.safetensors").specs
    packed = [name for name in specs if name.endswith(".four_bits")]
    assert packed
    assert not (tmp_path / "twin" / "experts" / "sms" / "adapter_model.safetensors").exists()
    assert artifact.bytes_per_part()["exclusive"] <= 2 * artifact.shared.nbytes
    assert not any(isinstance(part, FourBits) for part in artifact.exclusive("sms").values())


def test_grown_expert_is_weighed_as_the_others_are(family: Any, tmp_path: Path) -> None:
    made: Family = family("bert")
    sources = {n: {"model": n, "router_data": f"{n}.jsonl"} for n in EXPERTS[:2]}
    exclusive = {"rank": 2, "weighting": "two_sided", "weighting_rows": ROWS}
    recipe = made.recipe(exclusive=exclusive, **TOKENS)
    build(recipe.model_validate({**recipe.model_dump(), "experts": sources}), tmp_path / "two")
    new = EXPERTS[2]
    add(tmp_path / "two", new, model=made.root / new, router_data=made.root / f"{new}.jsonl")
    artifact, plan = TwinArtifact.open(tmp_path / "two"), made.plan(exclusive=exclusive)
    known = measured(made, new)
    name = next(n for n in known if n.endswith("intermediate.dense.weight" + LEFT)).removesuffix(LEFT)
    base = plan.base.read(name)
    difference = plan.experts[new].task_vector(name, base) + base - artifact.shared.read(name)
    expected = reference.weighed_low_rank(difference, known[name + LEFT], known[name + RIGHT], 2)
    assert torch.allclose(artifact.exclusive(new)[name].dense().double(), expected, atol=1e-4)


def test_layers_that_nothing_reached_count_as_much_as_others(tmp_path: Path) -> None:
    sizes = torch.tensor([1.0, 4.0])
    known = {"a.weight" + LEFT: torch.eye(2), "a.weight" + RIGHT: 4 * torch.eye(2), "a.weight" + SIZES: sizes}
    save_tensors(known, tmp_path / "one.safetensors")
    save_tensors({"other": torch.ones(1)}, tmp_path / "none.safetensors")
    weighting = Weighting({n: Checkpoint.open(tmp_path / f"{n}.safetensors") for n in ("one", "none")})
    for expert, usual in (("one", 4.0), ("none", 1.0)):
        sides = weighting.of(expert, "b.weight", (3, 2))
        assert torch.allclose(sides.apply(torch.ones(3, 2)), torch.full((3, 2), usual**0.5).double())


def test_encoder_decoders_are_refused_where_it_is_asked_for_and_left_unweighed_where_not(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    base = tiny.seeded(transformers.T5ForConditionalGeneration, config)
    made = tiny.make_family(tmp_path, base, type(base), scale=0.1)
    assert checked(made.plan(exclusive={"budget": 3.0})).plan.recipe.exclusive.weighting == "none"
    with pytest.raises(MismatchError, match=r"exclusive\.weighting: inputs is measured on models of one stack"):
        checked(made.plan(exclusive={"rank": 1, "weighting": "inputs"}))


def test_what_is_measured_is_counted_on_the_disk(classifiers: Family) -> None:
    exclusive = {"rank": 2, "weighting": "two_sided", "weighting_rows": ROWS}
    plan = checked(classifiers.plan(exclusive=exclusive)).plan
    found = measured(classifiers, "sms")
    bounds = {task.name: moment_bytes(task) for task in weighted(plan)}
    for name, bound in bounds.items():
        held = sum(found[name + side].nbytes for side in (LEFT, RIGHT) if name + side in found)
        assert held <= bound
    assert shutil.disk_usage("/").free > sum(bounds.values())


def measured_of(class_name: str) -> dict[str, Tensor]:
    model = small_model(class_name).requires_grad_(False)
    subject = Subject("a", TwinModel(model, {"a": {}}), CONTINUATION, {n: n for n, _ in model.named_parameters()})
    inputs = inputs_for(model, "causal", rows=1)
    return {
        n: t for part in moments(subject, [inputs], gradients=True, seed=0, most_bytes=10**9) for n, t in part.items()
    }


def test_class_without_gradients_is_refused_by_name() -> None:
    with pytest.raises(MismatchError, match=r"^expert 'a': exclusive.weighting: two_sided needs gradients, and Rwkv"):
        measured_of("RwkvForCausalLM")


def test_layers_that_a_class_takes_out_of_the_gradient_count_as_others_do() -> None:
    found = measured_of("HYV4ForCausalLM")
    assert found
    assert all(tensor.isfinite().all() for tensor in found.values())
