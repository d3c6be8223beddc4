"""A suite of images runs as one of texts does: tiny ViTs, pictures that each belong to one expert."""

import json
from pathlib import Path

import pytest
import transformers

from tests.jobs.test_images import make
from tests.tiny import EXPERTS
from twinmerge.eval.harness import run_suite
from twinmerge.eval.suite import Suite
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time

SUITE = """
name: images
root: .
base: base
experts: "{task}"
data: "{task}.{split}.jsonl"
unseen_data: "{task}.{split}.jsonl"
tasks: {ag: {}, sms: {}, trec: {}}
unseen: {probe: {}}
shared: {method: average}
router: {features: all, gate: hard}
contestants:
  experts: {title: experts, kind: experts}
  top1: {title: top-1, kind: top1}
  average: {title: average, kind: static, shared: {method: average}}
  whole: {title: whole, kind: twin, shared: {method: average}, exclusive: {rank: 9999, embeddings: exclusive}}
"""


def test_experts_and_a_twin_of_full_rank_score_one_on_pictures(tmp_path: Path) -> None:
    family = make(tmp_path, "vit")
    for name in EXPERTS:
        classifier = transformers.pipeline(
            "image-classification", model=str(tmp_path / name), image_processor=str(family.base)
        )
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        labelled = [{**row, "label": classifier(str(tmp_path / row["image"]))[0]["label"]} for row in rows]
        for split, part in {"router": labelled[:6], "validation": labelled[6:8], "test": labelled[8:]}.items():
            (tmp_path / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    probe = [{"image": f"pictures/{name}{n}.png", "label": name} for n in range(3) for name in ("ag", "sms")]
    for split in ("validation", "test"):
        (tmp_path / f"probe.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probe))
    (tmp_path / "suite.yaml").write_text(SUITE)
    suite = Suite.load(tmp_path / "suite.yaml")
    result = run_suite(suite, tmp_path / "out")
    scores = {one.name: one.normalized_oracle_head.value for one in result.summaries}
    assert scores["experts"] == 1.0
    assert scores["whole"] == 1.0
    assert result.summaries[-1].unseen == {"probe": 1.0}
    spec = suite.contestants["whole"]
    build(suite.recipe(spec.shared, spec.exclusive, None, 0), tmp_path / "twin")
    rows = suite.task("sms", 0).test
    answers = list(predict(TwinModel.from_pretrained(tmp_path / "twin"), [{"image": row["image"]} for row in rows]))
    confusion = next(one.confusion for one in result.contestants if one.name == "whole")
    assert confusion is not None
    assert confusion["sms"] == {name: [a["expert"] for a in answers].count(name) for name in family.experts}
