"""A suite runs on tiny models: scores, resumption, choice on validation rows, and what the router must not see."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from tests import tiny
from twinmerge.errors import DataError, InputError, RecipeError
from twinmerge.eval import harness
from twinmerge.eval.ablation import sliced
from twinmerge.eval.harness import run_suite
from twinmerge.eval.metrics import MISROUTED
from twinmerge.eval.results import read_predictions
from twinmerge.eval.seed import ANY_ROUTER, SeedRun, inputs_of
from twinmerge.eval.suite import Suite, TaskSpec
from twinmerge.files.progress import silent
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict
from twinmerge.jobs.tune import NEXT_TO_NOTHING
from twinmerge.routing.router import Stored
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

SUITE = """
name: tiny
root: {root}
base: base
base_title: a tiny BERT
experts: "{{task}}"
data: "{{task}}.{{split}}.jsonl"
unseen_data: "{{task}}.{{split}}.jsonl"
tasks: {{ag: {{}}, sms: {{metric: macro_f1}}, trec: {{}}}}
unseen: {{far: {{head: sms}}, probe: {{}}}}
validation_rows: 6
shared: {{method: average}}
router: {{features: all, samples_per_expert: 20}}
router_ablation: true
contestants:
  pretrained: {{title: pretrained, kind: static, shared: {{method: pretrained}}}}
  experts: {{title: experts, kind: experts}}
  top1: {{title: top-1, kind: top1}}
  chosen: {{title: chosen, kind: static, shared: {{method: task_arithmetic}}, scalings: [0.0, 1.0]}}
  whole: {{title: whole, kind: twin, shared: {{method: average}}, exclusive: {{rank: 99, embeddings: exclusive}}}}
  auto:
    title: auto
    kind: twin
    shared: {{method: task_arithmetic, scaling: auto}}
    exclusive: {{rank: 1}}
    router: {{method: centroid, features: last}}
  masks: {{title: masks, kind: per_task, shared: {{method: tall}}, thresholds: [0.01, 1000.0]}}
  groups: {{title: groups, kind: twin, shared: {{method: average}}, exclusive: {{rank: 2}}, groups: 4}}
sources: [made for tests]
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Three experts whose labels are what each expert itself answers, so that experts score 1."""
    root = tmp_path_factory.mktemp("suite")
    family = tiny.make_family(root, tiny.bert(), tiny.transformers.BertForSequenceClassification, scale=0.05)
    for name in family.experts:
        rows = tiny.text_rows(name, 40)
        labels = _answers(root / name, root / "base", rows)
        labelled = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
        parts = {"router": labelled[:20], "validation": labelled[20:26], "test": labelled[26:]}
        for split, part in parts.items():
            (root / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, labels in (("far", ("LABEL_0", "LABEL_1")), ("probe", ("a", "b"))):
        rows = [{"text": f"w{5 + i} w{9 + i}", "label": labels[i % 2]} for i in range(12)]
        for split in ("validation", "test"):
            (root / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / "suite.yaml"
    path.write_text(SUITE.format(root=root))
    return Suite.load(path)


def _answers(expert: Path, base: Path, rows: list[dict[str, str]]) -> list[str]:
    model: Any = tiny.transformers.BertForSequenceClassification.from_pretrained(expert)
    tokens = tiny.transformers.AutoTokenizer.from_pretrained(base)(
        [row["text"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return [model.config.id2label[i] for i in model.float().eval()(**tokens).logits.argmax(dim=1).tolist()]


@pytest.fixture(scope="module")
def run(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The whole suite, once."""
    out = tmp_path_factory.mktemp("out")
    return out, run_suite(suite, out)


def test_experts_and_a_twin_of_full_rank_score_one(run: Any) -> None:
    _, result = run
    scores = {one.name: one.normalized_oracle_head.value for one in result.summaries}
    assert scores["experts"] == 1.0
    routed = {one.name: one for one in result.summaries}["whole"]
    top1 = {one.name: one for one in result.summaries}["top1"]
    assert routed.normalized_oracle_head.value == pytest.approx(top1.normalized_oracle_head.value, abs=0.1)


def test_a_twin_is_measured_as_a_user_has_it(run: Any, suite: Suite, tmp_path: Path) -> None:
    """Built, loaded and asked with the defaults: the same answers, experts and gates."""
    out, result = run
    spec = suite.contestants["auto"]
    build(suite.recipe(spec.shared, spec.exclusive, spec.router, 0), tmp_path / "twin")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    kept = read_predictions(out / "runs" / "auto.seed-0.predictions.json.gz")
    measured = next(one for one in result.contestants if one.name == "auto")
    for name in suite.tasks:
        rows = suite.task(name, 0).test
        answers = list(predict(model, inputs_of(rows)))
        routed = [answer["label"] if answer["expert"] == name else MISROUTED for answer in answers]
        assert kept.tasks[name].routed == routed
        assert measured.gate_mean[name] == pytest.approx(
            {expert: sum(answer["gate"][expert] for answer in answers) / len(rows) for expert in sorted(suite.tasks)}
        )


@pytest.mark.parametrize("contestant", ["pretrained", "masks"])
def test_a_merge_answers_as_its_folder_does_in_plain_transformers(
    run: Any, suite: Suite, tmp_path: Path, contestant: str
) -> None:
    shared = suite.contestants[contestant].shared
    measured = next(one for one in run[1].contestants if one.name == contestant)
    kept = read_predictions(run[0] / "runs" / f"{contestant}.seed-0.predictions.json.gz")
    tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(suite.root_of(0) / "base")
    for name in suite.tasks:
        own = shared
        if contestant == "masks":  # each task's own model
            threshold = measured.settings[f"threshold.{name}"]
            assert threshold in (0.01, 1000.0)
            own = shared.model_copy(update={"task": name, "threshold": threshold})
        build(suite.recipe(own, NEXT_TO_NOTHING, ANY_ROUTER, 0), tmp_path / "twin", overwrite=True)
        model: Any = tiny.transformers.BertForSequenceClassification.from_pretrained(suite.root_of(0) / name)
        model.bert = tiny.transformers.BertModel.from_pretrained(tmp_path / "twin")
        tokens = tokenizer([row["text"] for row in suite.task(name, 0).test], padding=True, return_tensors="pt")
        with torch.inference_mode():
            best = model.eval()(**tokens).logits.argmax(dim=1).tolist()
        assert kept.tasks[name].oracle_head == [model.config.id2label[index] for index in best]


def test_experts_that_are_adapters_answer_as_peft_merges_them(suite: Suite, tmp_path: Path) -> None:
    family, merged = tiny.adapter_family(tmp_path)
    for name in family.experts:
        (tmp_path / f"{name}.router.jsonl").write_text((tmp_path / f"{name}.jsonl").read_text())
    at = SeedRun(suite.model_copy(update={"root": str(tmp_path)}), 0, silent)
    ids = torch.tensor([[5, 9, 17, 30]])
    for name, model in merged.items():
        with torch.inference_mode():
            found, expected = at.body(name)(ids)[0], model.base_model(ids)[0]
        assert torch.allclose(found, expected, atol=1e-5), name  # float32 sums in another order


def test_experts_read_rows_by_their_own_tokenizers(suite: Suite, tmp_path: Path) -> None:
    root = Path(shutil.copytree(suite.root_of(0), tmp_path / "suite"))
    made = tiny.tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Replace("w", "w4")  # w7 is read as w47
    made.save_pretrained(root / "sms")
    at = SeedRun(suite.model_copy(update={"root": str(root), "unseen": {}}), 0, silent)
    rows = at.tasks["sms"].test
    assert at.expert_answers["sms"] == _answers(root / "sms", root / "sms", rows)
    assert at.expert_answers["sms"] != _answers(root / "sms", root / "base", rows)
    assert at.reference.model.own_of("sms").reads


def test_narrow_experts_are_computed_as_their_heads_are(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where the machine is slow at 16 bits."""
    monkeypatch.setenv("TWINMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("twinmerge.runtime.precision.fastest", lambda _: "float32")
    root = Path(shutil.copytree(suite.root_of(0), tmp_path / "suite"))
    for folder in ("base", *tiny.EXPERTS):
        config = root / folder / "config.json"
        config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
        tiny.rewrite(
            root / folder / "model.safetensors",
            lambda tensors: {name: value.to(torch.bfloat16) for name, value in tensors.items()},
        )
    at = SeedRun(suite.model_copy(update={"root": str(root), "unseen": {}}), 0, silent)
    assert at.reference.model.backbone.dtype == torch.float32
    for name in tiny.EXPERTS:
        assert at.body(name).dtype == torch.bfloat16
        assert at.expert_answers[name] == _answers(root / name, root / "base", at.tasks[name].test)


def test_the_suites_own_router_is_that_of_its_first_such_twin(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is not built twice."""
    at, built = SeedRun(suite.model_copy(update={"test_rows": 1, "unseen": {}}), 0, silent), []
    whole = SeedRun.build

    def counted(*settings: Any) -> Any:
        built.append(settings)
        return whole(*settings)

    monkeypatch.setattr(SeedRun, "build", counted)
    spec = suite.contestants["whole"]
    assert at.reference is at.twin(spec.shared, spec.exclusive, spec.router)
    assert len(built) == 1


def test_a_misrouted_row_is_wrong_when_routed(run: Any) -> None:
    _, result = run
    for one in result.contestants:
        if one.normalized_routed is not None:
            assert one.normalized_routed.value <= one.normalized_oracle_head.value + 1e-12


def test_the_scaling_is_the_best_on_validation_rows(run: Any, suite: Suite) -> None:
    _, result = run
    chosen = next(one for one in result.contestants if one.name == "chosen")
    at = SeedRun(suite, 0, silent)
    scores = {}
    for scaling in (0.0, 1.0):
        shared = suite.contestants["chosen"].shared.model_copy(update={"scaling": scaling})
        model = at.build(shared, NEXT_TO_NOTHING, ANY_ROUTER).model
        right = []
        for task in at.tasks.values():
            answers = at.answers(model, task.validation, None, [task.name] * len(task.validation), "")
            right.append(sum(a == row["label"] for a, row in zip(answers, task.validation, strict=True)))
        scores[scaling] = sum(right)
    assert scores[chosen.settings["scaling"]] == max(scores.values())


def test_test_rows_are_the_first_ones(suite: Suite) -> None:
    few = suite.model_copy(update={"test_rows": 5})
    for name, task in SeedRun(suite, 0, silent).tasks.items():
        assert len(task.test) > 5
        assert list(SeedRun(few, 0, silent).tasks[name].test) == list(task.test)[:5]


def test_bytes_of_exclusive_parts_are_those_on_disk_and_static_merges_have_none(run: Any) -> None:
    _, result = run
    by_name = {one.name: one for one in result.contestants}
    assert by_name["chosen"].bytes["exclusive"] == 0
    assert 0 < by_name["auto"].bytes["exclusive"] < by_name["whole"].bytes["exclusive"]


def test_finished_runs_are_not_run_again(run: Any, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    out, result = run
    monkeypatch.setattr("twinmerge.eval.harness.run_contestant", lambda *_: pytest.fail("ran again"))
    again = run_suite(suite.model_copy(update={"folder": out}), out)  # wherever its file lies
    assert again.contestants == result.contestants
    assert again.routers == result.routers


def test_a_run_without_git_loses_no_results(
    run: Any, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_suite(suite, run[0], contestants=["whole"]).environment.commit == "unknown", "no repository"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_suite(suite, run[0], contestants=["whole"]).environment.commit == "unknown", "no git"


def test_other_settings_and_another_precision_are_run_again(
    run: Any, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinmerge.eval.harness.run_contestant", lambda *_: pytest.fail("ran again"))
    spec = suite.contestants["auto"].model_copy(update={"exclusive": suite.contestants["groups"].exclusive})
    for changed in ({"contestants": {"auto": spec}}, {"precision": "bfloat16"}, {"max_length": 7}):
        with pytest.raises(pytest.fail.Exception, match="ran again"):
            run_suite(suite.model_copy(update=changed), run[0], contestants=["auto"])


def test_routers_of_other_settings_are_compared_again(
    run: Any, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = run
    (tmp_path / "routers.seed-0.json").write_bytes((out / "runs" / "routers.seed-0.json").read_bytes())
    monkeypatch.setattr("twinmerge.eval.harness.router_ablation", lambda _: [])
    assert harness._routers(tmp_path, SeedRun(suite, 0, silent)) == result.routers
    fewer = suite.router.model_copy(update={"samples_per_expert": 10})
    assert harness._routers(tmp_path, SeedRun(suite.model_copy(update={"router": fewer}), 0, silent)) == []


@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": 1}'])
def test_a_damaged_run_is_no_finished_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "twin.seed-0.json").write_text(content)
    assert harness._kept(tmp_path / "twin.seed-0.json", "mark") is None


def test_auto_is_the_fastest_precision_of_the_machine_and_the_result_names_it(
    run: Any, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = run
    monkeypatch.setattr("twinmerge.runtime.precision.fastest", lambda _: "float32")
    monkeypatch.setenv("TWINMERGE_CACHE", str(out / "cache"))
    again = run_suite(suite.model_copy(update={"precision": "auto"}), out, contestants=["whole"])
    assert again.contestants == [one for one in result.contestants if one.name == "whole"], "it is not run again"
    assert again.contestants[0].settings["precision"] == "float32"


def test_router_ablation_covers_features_methods_and_counts(run: Any) -> None:
    _, result = run
    assert {one.method for one in result.routers} == {"linear", "mlp", "centroid", "knn"}
    assert {"last", "all", "embeddings", "layer:1"} <= {one.features for one in result.routers}
    assert {one.inputs_per_expert for one in result.routers} >= {20, 10}
    best = next(one for one in result.routers if one.features == "all" and one.method == "linear")
    assert best.accuracy > 0.6, "three experts: chance is 1/3"


def test_unseen_tasks_are_scored_by_head_and_by_probe(run: Any) -> None:
    _, result = run
    whole = next(one for one in result.contestants if one.name == "whole")
    assert set(whole.unseen) == {"far", "probe"}
    assert all(0 <= value <= 1 for value in whole.unseen.values())


def _other_head(suite: Suite, root: Path, cls: str, **settings: Any) -> Suite:
    """The suite in another place, where one expert has another head."""
    shutil.copytree(suite.root_of(0), root / "suite")
    config = tiny.transformers.BertConfig.from_pretrained(root / "suite" / "sms", **settings)
    torch.manual_seed(0)
    model = getattr(tiny.transformers, cls)(config)
    own = tiny.transformers.BertModel.from_pretrained(root / "suite" / "sms").state_dict()
    model.base_model.load_state_dict({name: own[name] for name in model.base_model.state_dict()})
    model.save_pretrained(root / "suite" / "sms")
    return suite.model_copy(update={"root": str(root / "suite")})


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        ("BertForMaskedLM", {}, "expert 'sms' is a BertForMaskedLM, whose output layer all experts share"),
        ("BertForTokenClassification", {}, "'sms': a suite compares labels .* found entities .BertForTokenClassif"),
        (
            "BertForQuestionAnswering",
            {"num_labels": 2},
            "'sms': a suite compares labels .* found span",
        ),
        (
            "BertForSequenceClassification",
            {"num_labels": 1},
            "'sms': a suite compares labels .* found value",
        ),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, "'sms': .* found labels"),
        ("BertModel", {}, "'sms'"),
        (
            "BertForSequenceClassification",
            {"id2label": {0: "ham", 1: "spam"}},
            "expert 'sms' can give none of the labels of its test rows: it knows ham, spam, they have LABEL_0",
        ),
    ],
)
def test_experts_whose_heads_give_no_label_of_their_rows_are_refused_before_any_work(
    suite: Suite, tmp_path: Path, cls: str, settings: dict[str, Any], message: str
) -> None:
    other, stages = _other_head(suite, tmp_path, cls, **settings), []
    with pytest.raises(InputError, match=message) as refused:
        run_suite(other, tmp_path / "out", progress=lambda stage, *_: stages.append(stage))
    assert "\n" not in str(refused.value)
    assert stages == []
    assert not (tmp_path / "out").exists()


def test_a_contestant_that_cannot_be_built_is_refused_before_any_work(suite: Suite, tmp_path: Path) -> None:
    router = RouterSettings.model_validate({"features": "layer:50"})
    last = suite.contestants["auto"].model_copy(update={"router": router})
    wrong = suite.model_copy(update={"contestants": {**suite.contestants, "auto": last}})
    with pytest.raises(InputError, match="layer:50|layer 50"):
        run_suite(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_contestant_is_named(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown contestant 'twn'; the suite has pretrained"):
        run_suite(suite, tmp_path, contestants=["twn"])


def test_slices_of_all_features_are_the_layers() -> None:
    stored = Stored({Layers("all"): torch.arange(12.0).reshape(1, 12)})

    def of(layers: Layers) -> Any:
        return sliced(stored, layers, 4).hidden(layers).tolist()

    assert of(Layers((0,))) == [[0, 1, 2, 3]]
    assert of(Layers((1,))) == [[4, 5, 6, 7]]
    assert of(Layers("last")) == [[8, 9, 10, 11]]
    assert of(Layers((0, 2))) == [[0, 1, 2, 3, 8, 9, 10, 11]]
    assert of(Layers("all")) == [list(range(12))]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: top1", "kind: topp1", r"suite.yaml:\d+: contestants.top1.kind: input should be 'experts'"),
        ("exclusive: {rank: 1}", "scalings: [1.0]", r"exclusive belongs to kind twin, and only to it; found kind twin"),
        ("{method: pretrained}", "{method: pretrained}, scalings: [1.0]", r"scalings belong to kind static"),
        ("{method: pretrained}", "{method: emr}", r"emr, is for kind per_task, .*found kind static with emr"),
        ("{method: pretrained}", "{method: average}, thresholds: [1]", r"thresholds belong to a method that has a thr"),
        (
            "{method: pretrained}",
            "{method: ties, density: {x: 0.1}}",
            r"contestants.pretrained.shared: density must be one number",
        ),
        ("{head: sms}", "{head: spam}", r"unseen.far.head must be a task of the suite, found 'spam'"),
        ("ag: {}, sms: {metric: macro_f1}, trec: {}", "ag: {}", r"a suite needs at least two tasks, found 1"),
        (
            "sms: {metric: macro_f1}",
            "sms: {metric: f1}",
            r"suite.yaml:\d+: tasks.sms: metric f1, and only that one, needs",
        ),
        ("ag: {}", "ag: {positive_label: x}", r"needs a positive_label; found metric accuracy with 'x'"),
        (
            "ag: {}",
            "ag: {metric: f2}",
            r"tasks.ag.metric: input should be 'accuracy', 'f1', 'macro_f1', 'exact_match' or 'chrf', found 'f2'",
        ),
        ("validation_rows", "validation_row", r"unknown key 'validation_row'; did you mean 'validation_rows'\?"),
    ],
)
def test_a_suite_that_is_wrong_says_where(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = SUITE.format(root=tmp_path)
    assert old in text
    path = tmp_path / "suite.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        Suite.load(path)


def test_a_label_that_no_test_row_has_is_refused(suite: Suite) -> None:
    tasks = {**suite.tasks, "sms": TaskSpec(metric="f1", positive_label="Spam")}
    with pytest.raises(DataError, match="task 'sms': no test row has the positive_label 'Spam'"):
        SeedRun(suite.model_copy(update={"tasks": tasks}), 0, silent).tasks  # noqa: B018


def test_the_cache_variable_is_known_without_being_set(monkeypatch: pytest.MonkeyPatch, suite: Suite) -> None:
    monkeypatch.delenv("TWINMERGE_CACHE", raising=False)
    root = suite.model_copy(update={"root": "$TWINMERGE_CACHE/text/seed{seed}"}).root_of(2)
    assert root == Path("~/.cache/twinmerge/text/seed2").expanduser().resolve()
