"""What is measured on calibration data is what the formulas say, and merges with it go through merge and build."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor

from tests import reference, tiny
from tests.tiny import EXPERTS, Family, adapter_family
from twinmerge.cli import main
from twinmerge.errors import DataError, InputError, MismatchError, RecipeError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.inputs import tokenize
from twinmerge.hf.measurements import Subject, fisher, grams
from twinmerge.jobs import measure as module
from twinmerge.jobs.build import build
from twinmerge.jobs.measure import Calibration, for_merge, for_twin
from twinmerge.jobs.merge import merge_models
from twinmerge.jobs.preflight import checked
from twinmerge.merging import method as registry
from twinmerge.merging.method import Calibrated, Chunk, Method, merge_method
from twinmerge.merging.plan import plan_merge
from twinmerge.merging.recipe import load_merge
from twinmerge.merging.regmean import BY_COLUMN, BY_ROW
from twinmerge.merging.statistics import Statistics
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]
ROWS = 4


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base with a head, and fine-tunes of it with that head."""
    root = tmp_path_factory.mktemp("classifiers")
    config = tiny.text_config(transformers.BertConfig, num_labels=2)
    base = tiny.seeded(transformers.BertForSequenceClassification, config)
    return tiny.make_family(root, base, type(base), scale=0.1)


def recipe(folder: Path, root: Path, method: str, **settings: Any) -> Path:
    """A static merge with the family's rows as calibration data."""
    data = {name: str(root / f"{name}.jsonl") for name in EXPERTS}
    shared = {"method": method, "calibration_data": data, "calibration_rows": ROWS, **settings}
    sources = {"base": str(root / "base"), "experts": {name: str(root / name) for name in EXPERTS}}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump({**sources, "shared": {k: v for k, v in shared.items() if v is not None}}))
    return path


def calibration(folder: Path, root: Path, method: str) -> Calibration:
    found = for_merge(plan_merge(load_merge(recipe(folder, root, method))))
    assert found is not None
    return found


def loaded(found: Calibration, name: str) -> tuple[Subject, list[dict[str, Tensor]]]:
    subject = found.load(name)
    return subject, [tokenize(subject.model, [row]) for row in found.rows[name]]


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


# ---- Fisher


def test_fisher_of_a_two_class_head_is_that_of_logistic_regression_by_hand(classifiers: Family, tmp_path: Path) -> None:
    subject, inputs = loaded(calibration(tmp_path, classifiers.root, "fisher"), "sms")
    model, pooled = subject.model.backbone, []
    model.classifier.register_forward_pre_hook(lambda _, args: pooled.append(args[0][0].double()))
    found = fisher(subject, inputs)
    weight, bias = model.classifier.weight.detach().double(), model.classifier.bias.detach().double()
    of_weight, of_bias = reference.logistic_fisher(weight, bias, torch.stack(pooled).detach())
    assert torch.allclose(found["classifier.weight"].double(), of_weight, rtol=1e-4)
    assert torch.allclose(found["classifier.bias"].double(), of_bias, rtol=1e-4)


def test_fisher_is_the_sum_over_classes_of_squared_gradients_one_input_at_a_time(
    classifiers: Family, tmp_path: Path
) -> None:
    subject, inputs = loaded(calibration(tmp_path, classifiers.root, "fisher"), "sms")
    found, model = fisher(subject, inputs), subject.model.backbone.double()
    for name in ("bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.LayerNorm.bias"):
        parameter, expected = model.get_parameter(name).requires_grad_(True), 0.0
        for row in inputs:
            for c in range(2):
                log_p = model(**row).logits[0].log_softmax(0)[c]
                [gradient] = torch.autograd.grad(log_p, [parameter])
                expected = expected + float(log_p.detach().exp()) * gradient**2 / len(inputs)
        assert torch.allclose(found[name].double(), expected, rtol=1e-3, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in found.values())


def test_how_inputs_are_grouped_and_ordered_does_not_matter(classifiers: Family, tmp_path: Path) -> None:
    for method, measure in (("fisher", fisher), ("regmean", grams)):
        subject, inputs = loaded(calibration(tmp_path, classifiers.root, method), "sms")
        once, other = measure(subject, inputs), measure(subject, list(reversed(inputs)))
        halves = [measure(subject, inputs[:1]), measure(subject, inputs[1:])]
        counts = [1, ROWS - 1] if method == "fisher" else [ROWS, ROWS]
        for name, tensor in once.items():
            assert torch.allclose(other[name], tensor, rtol=1e-4, atol=1e-9)
            together = sum(half[name] * count / ROWS for half, count in zip(halves, counts, strict=True))
            assert torch.allclose(together, tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "settings", "slopes"),
    [
        ("BertForSequenceClassification", {"num_labels": 1}, lambda z: torch.ones_like(z)),
        (
            "BertForSequenceClassification",
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            lambda z: z.sigmoid() * (1 - z.sigmoid()),
        ),
        ("BertForTokenClassification", {"num_labels": 3}, lambda z: _of_softmax(z).sum(0)),
        ("BertForQuestionAnswering", {"num_labels": 2}, lambda z: torch.zeros(2)),  # the same to all places is nothing
    ],
)
def test_every_kind_of_answer_has_its_information(
    tmp_path: Path, cls: str, settings: dict[str, Any], slopes: Callable[[Tensor], Tensor]
) -> None:
    """The bias of the last layer adds to each logit: its information is that of the logits."""
    made = getattr(transformers, cls)
    base = tiny.seeded(made, tiny.text_config(transformers.BertConfig, **settings))

    def rows(name: str) -> list[dict[str, str]]:
        return [{**row, **({"text_pair": row["text"]} if "Question" in cls else {})} for row in tiny.text_rows(name)]

    root = tiny.make_family(tmp_path / "family", base, made, rows=rows).root
    subject, inputs = loaded(calibration(tmp_path, root, "fisher"), "sms")
    found = fisher(subject, inputs)
    bias = "qa_outputs.bias" if "Question" in cls else "classifier.bias"
    logits = [subject.logits(row)[0].detach() for row in inputs]
    assert torch.allclose(found[bias], sum(slopes(z) for z in logits) / ROWS, rtol=1e-4, atol=1e-12)
    weight, slow = subject.parameters[bias.replace("bias", "weight")].requires_grad_(True), 0.0
    for row in inputs if "Question" in cls else ():
        for log_p in subject.logits(row)[0].T.log_softmax(-1).flatten():
            [gradient] = torch.autograd.grad(log_p, [weight], retain_graph=True)
            slow = slow + float(log_p.detach().exp()) * gradient**2 / ROWS
    assert "Question" not in cls or torch.allclose(found[bias.replace("bias", "weight")], slow, rtol=1e-3, atol=1e-9)


def _of_softmax(z: Tensor) -> Tensor:
    """sum_c p_c (d log p_c / d z_k)^2 = p_k (1 - p_k)."""
    p = z.softmax(-1)
    return p * (1 - p)


# ---- Gram matrices


def test_grams_hold_real_tokens_only(classifiers: Family, tmp_path: Path) -> None:
    subject, inputs = loaded(calibration(tmp_path, classifiers.root, "regmean"), "sms")
    found, model, seen = grams(subject, inputs), subject.model.backbone, []
    padded = tokenize(subject.model, calibration(tmp_path, classifiers.root, "regmean").rows["sms"])
    real = padded["attention_mask"].bool()
    assert not real.all()
    layer = "bert.encoder.layer.1.intermediate.dense"
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**padded)
    x = seen[0][real].double()
    assert torch.allclose(found[f"{layer}.weight{BY_COLUMN}"].double(), x.T @ x, rtol=1e-4, atol=1e-4)
    assert set(found) == {
        f"{name}.weight{BY_COLUMN}" for name, m in model.named_modules() if type(m) is torch.nn.Linear
    }


def test_conv1d_takes_its_inputs_by_row(family: Get, tmp_path: Path) -> None:
    """GPT-2: the merge of a layer from what it read, by the reference."""
    root = family("gpt2").root
    layer, weights, read_by = "transformer.h.0.mlp.c_fc", [], []
    found = calibration(tmp_path, root, "regmean")
    for name in sorted(EXPERTS):
        subject, inputs = loaded(found, name)
        assert f"{layer}.weight{BY_ROW}" in grams(subject, inputs)
        seen: list[Tensor] = []
        subject.model.backbone.get_submodule(layer).register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0][0]))
        for row in inputs:
            subject.model.backbone(**row)
        read_by.append(torch.cat(seen).double())
        weights.append(read(root / name)[f"{layer}.weight"].double())
    merge_models(recipe(tmp_path, root, "regmean"), tmp_path / "out")
    merged = read(tmp_path / "out")
    expected = reference.regmean(weights, read_by, 0.9)
    assert torch.allclose(merged[f"{layer}.weight"].double(), expected, atol=1e-5)
    head = "transformer.wte.weight"  # tied to the output layer: an embedding, averaged
    assert torch.allclose(merged[head], torch.stack([read(root / n)[head] for n in EXPERTS]).mean(0), atol=1e-6)


# ---- in merge, build and plan


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_prefixed_experts_with_heads_are_merged_in_merge_and_build_alike(
    family: Get, tmp_path: Path, method: str
) -> None:
    root = family("bert").root
    merge_models(recipe(tmp_path, root, method), tmp_path / "merged")
    shared = {"method": method, "calibration_rows": ROWS}
    build(family("bert").recipe(shared=shared, exclusive={"rank": 1}, router={"features": "tokens"}), tmp_path / "twin")
    merged, built = read(tmp_path / "merged"), TwinArtifact.open(tmp_path / "twin").shared
    average = torch.stack([read(root / n)["bert.encoder.layer.0.output.dense.weight"] for n in EXPERTS]).mean(0)
    assert all(torch.allclose(tensor, built.read(name), atol=1e-5) for name, tensor in merged.items())
    assert not torch.allclose(merged["encoder.layer.0.output.dense.weight"], average, atol=1e-5)
    manifest = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (tmp_path / manifest["recipe"]["calibration_data"]["sms"]).resolve() == root / "sms.jsonl"


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_adapters_are_measured_as_the_models_they_make(tmp_path: Path, method: str) -> None:
    made, merged = adapter_family(tmp_path / "family")
    data = {name: f"{name}.jsonl" for name in EXPERTS}
    shared = {"method": method, "calibration_data": data, "calibration_rows": ROWS}
    plan = made.plan(shared=shared)
    found = for_twin(checked(plan))
    assert found is not None
    measure = {"fisher": fisher, "regmean": grams}[method]
    subject, inputs = loaded(found, "trec")
    with torch.no_grad():
        wanted = merged["trec"](**inputs[0]).logits
    assert torch.allclose(subject.logits(inputs[0]), wanted, atol=1e-5)
    assert all(tensor.isfinite().all() for tensor in measure(subject, inputs).values())


def test_an_interrupted_merge_keeps_what_it_measured(
    classifiers: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = recipe(tmp_path, classifiers.root, "fisher"), []

    def stop(stage: str, done: int, total: int) -> None:
        told.append(stage)
        if stage == "merging" and done == 2:
            raise KeyboardInterrupt

    merge_models(path, tmp_path / "calm")
    with pytest.raises(KeyboardInterrupt):
        merge_models(path, tmp_path / "out", progress=stop)
    assert told.count("measuring experts") == 3
    measured: list[str] = []
    monkeypatch.setitem(module.MEASUREMENTS, "fisher", lambda subject, rows: measured.append(subject.name))
    merge_models(path, tmp_path / "out", resume=True)
    assert not measured
    assert read(tmp_path / "out").keys() == read(tmp_path / "calm").keys()
    assert all(torch.equal(tensor, read(tmp_path / "calm")[name]) for name, tensor in read(tmp_path / "out").items())


def test_plan_says_how_many_inputs_are_measured(
    classifiers: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipe(tmp_path, classifiers.root, "fisher")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration_rows"] == dict.fromkeys(EXPERTS, ROWS)


# ---- refusals, before any work


def spoiled(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "spoiled"))


def without_tokenizer(root: Path) -> None:
    for file in (root / "base").glob("tokenizer*"):
        file.unlink()


def without_config(root: Path) -> None:
    (root / "sms" / "config.json").unlink()


def as_encoder_decoder(root: Path) -> None:
    for name in ("base", *EXPERTS):
        path = root / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"is_encoder_decoder": True}))


def with_bad_rows(root: Path) -> None:
    (root / "sms.jsonl").write_text('{"txt": 1}\n')


WRONG: dict[str, tuple[Callable[[Path], object], dict[str, Any], type[InputError], str]] = {
    "no data": (
        lambda _: None,
        {"calibration_data": None},
        RecipeError,
        "'fisher' needs calibration_data, a file of inputs for",
    ),
    "data of some": (
        lambda _: None,
        {"calibration_data": {"ag": "ag.jsonl"}},
        RecipeError,
        "fisher.yaml:.*: shared: calibration_data must name a file for every expert",
    ),
    "no file": (
        lambda _: None,
        {"calibration_data": dict.fromkeys(EXPERTS, "gone.jsonl")},
        RecipeError,
        "calibration_data.ag: no file or folder .*gone.jsonl",
    ),
    "rows": (with_bad_rows, {}, DataError, r"sms.jsonl:1: .*text"),
    "tokenizer": (
        without_tokenizer,
        {},
        MismatchError,
        "base has no tokenizer and no image processor",
    ),
    "config": (without_config, {}, MismatchError, "sms must be a transformers model folder"),
    "two stacks": (
        as_encoder_decoder,
        {},
        MismatchError,
        "the models are encoder-decoders; fisher is for models of one stack",
    ),
    "rows asked": (
        lambda _: None,
        {"calibration_rows": 0},
        RecipeError,
        "calibration_rows: input should be greater than",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_measured_is_refused_before_any_work(classifiers: Family, tmp_path: Path, case: str) -> None:
    spoil, settings, error, words = WRONG[case]
    root = spoiled(classifiers.root, tmp_path)
    spoil(root)
    with pytest.raises(error, match=words):
        merge_models(recipe(tmp_path, root, "fisher", **settings), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_fisher_of_a_model_that_writes_text_is_refused(family: Get, tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError, match="'ag' answers with continuation and stop_reason; fisher sums over the classes"
    ):
        merge_models(recipe(tmp_path, family("gpt2").root, "fisher"), tmp_path / "out")
    with pytest.raises(
        MismatchError, match="'ag' answers with continuation and stop_reason; fisher sums over the classes"
    ):
        build(family("llama").recipe(shared={"method": "fisher"}, exclusive={"rank": 1}), tmp_path / "twin")


def test_a_measurement_that_nobody_makes_is_refused(classifiers: Family, tmp_path: Path) -> None:
    class Other(Calibrated):
        measurement = "moments"

    plan = plan_merge(load_merge(recipe(tmp_path, classifiers.root, "fisher")))
    chosen: Method = Other(method="other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan), "method", lambda self, name: chosen)
        with pytest.raises(RecipeError, match="'other' needs the measurement 'moments'; known are fisher, grams"):
            for_merge(plan)


def test_a_measured_method_of_another_package_is_a_merge_method_of_mergekits_recipes(
    classifiers: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loud(Calibrated):
        """The expert whose answers hang most on an entry."""

        measurement = "fisher"

        def merge(self, chunk: Chunk, statistics: Statistics) -> Tensor:
            stop = chunk.at + chunk.numel
            found = [statistics.read(name, chunk.tensor, chunk.at, stop) for name in chunk.names]
            loudest = torch.stack([f for f in found if f is not None]).argmax(0, keepdim=True)
            return torch.stack([chunk.value(name) for name in chunk.names]).gather(0, loudest)[0]

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    merge_method("loud", paper="arXiv:0000.00000")(Loud)
    root = classifiers.root
    names = [str(root / name) for name in sorted(EXPERTS)]
    content = {"merge_method": "loud", "base_model": str(root / "base"), "models": [{"model": name} for name in names]}
    path = tmp_path / "kit.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="'loud' needs calibration_data"):
        merge_models(path, tmp_path / "out")
    content["parameters"] = {"calibration_data": {name: f"{name}.jsonl" for name in names}, "calibration_rows": 2}
    path.write_text(yaml.safe_dump(content))
    merge_models(path, tmp_path / "out")
    experts, merged = [read(Path(name)) for name in names], read(tmp_path / "out")
    for name, tensor in merged.items():
        assert torch.stack([(tensor == expert[name]) for expert in experts]).any(0).all()
