"""What is an expert's own stays its own: tokenizer, end tokens, generation config, padding, pooling; or is refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig

from tests import tiny
from tests.tiny import Family
from twinmerge.errors import MismatchError
from twinmerge.hf.model import TwinModel
from twinmerge.hf.own import Own
from twinmerge.jobs.build import build
from twinmerge.jobs.export import export
from twinmerge.jobs.grow import replace
from twinmerge.jobs.predict import predict
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]
WHOLE = {"rank": 64, "embeddings": "exclusive"}
TEXTS = ["w5 w6 w7", "W30 w31", "w50 w51 w52 w53 w54", "w9"]


def copied(family: Get, name: str, root: Path) -> Family:
    return Family(Path(shutil.copytree(family(name).root, root / "models")))


def write(path: Path, **settings: Any) -> None:
    """Change some keys of a JSON file, which need not be there."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | settings))


def lowering() -> Any:
    """A tokenizer that lower-cases and opens with [CLS]."""
    made = tiny.tokenizer("left")
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)]
    )
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


# ---- causal LMs: ag ends with its own tokens and penalises, sms ends by its config alone, trec reads otherwise


@pytest.fixture(scope="module")
def writers(family: Get, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    root = tmp_path_factory.mktemp("writers")
    made = copied(family, "llama", root)
    ends = {"eos_token_id": list(range(3, 34)), "pad_token_id": 0, "bos_token_id": 2}
    GenerationConfig(**ends, repetition_penalty=1.5).save_pretrained(made.root / "ag")
    write(made.root / "ag" / "generation_config.json", do_sample=True, temperature=0.5)
    (made.root / "sms" / "generation_config.json").unlink()
    write(made.root / "sms" / "config.json", eos_token_id=[3, *range(34, 64)])
    lowering().save_pretrained(made.root / "trec")
    build(made.recipe(exclusive=WHOLE), root / "twin")
    return made, root / "twin"


def own_texts(made: Family, expert: str, texts: list[str], base: bool = False) -> list[tuple[str, str]]:
    """What the expert itself writes, greedily, each text alone; and why it stopped."""
    folder = made.root / expert
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(made.base if base else folder)
    ends = model.generation_config.eos_token_id
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        written = model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=0, temperature=None)[0]
        ids = written[inputs["input_ids"].shape[1] :]
        ended = any(int(token) in (ends if isinstance(ends, list) else [ends]) for token in ids)
        found.append((tokenizer.decode(ids, skip_special_tokens=True), "stop" if ended else "length"))
    return found


@pytest.mark.parametrize(("expert", "base"), [("ag", True), ("sms", True), ("trec", False)])
def test_expert_writes_as_it_writes_itself(writers: tuple[Family, Path], expert: str, base: bool) -> None:
    model = TwinModel.from_pretrained(writers[1], dtype=torch.float64)
    found = predict(model, [{"text": text} for text in TEXTS], expert=expert, max_new_tokens=6)
    expected = own_texts(writers[0], expert, TEXTS, base)
    assert [(answer["continuation"], answer["stop_reason"]) for answer in found] == expected
    if expert != "trec":
        assert "stop" in {reason for _, reason in expected}


def test_rows_of_a_batch_are_each_written_under_the_settings_of_their_expert(writers: tuple[Family, Path]) -> None:
    model = TwinModel.from_pretrained(writers[1], dtype=torch.float64)
    rows = [{"text": text} for text in TEXTS * 3] + tiny.text_rows("ag", 6) + tiny.text_rows("trec", 6)
    together = list(predict(model, rows, max_new_tokens=6))
    assert together == [answer for row in rows for answer in predict(model, [row], max_new_tokens=6)]
    assert len({answer["expert"] for answer in together}) == 3
    x = dict(tiny.tokenizer("left")(["w5 w6", "w30 w31"], return_tensors="pt"))
    names = ["sms", "ag"]
    written = model.generate(**x, expert=names, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in x.items()}
        one = model.generate(**alone, expert=name, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        assert written[row, : len(one)].tolist() == one.tolist()
        assert written[row, len(one) :].eq(0).all()


def test_stop_strings_of_an_expert_end_its_texts(family: Get, tmp_path: Path) -> None:
    made, rows = copied(family, "llama", tmp_path), [{"text": text.lower()} for text in TEXTS]
    tiny.by_letters().save_pretrained(made.root / "base")
    build(made.recipe(exclusive=WHOLE, router={"features": "tokens"}), tmp_path / "free")
    free = [
        a["continuation"]
        for a in predict(TwinModel.from_pretrained(tmp_path / "free"), rows, expert="ag", max_new_tokens=8)
    ]
    stop = next(text[2:4] for text in free if len(text) > 5)
    write(made.root / "ag" / "generation_config.json", stop_strings=[stop], eos_token_id=3, pad_token_id=0)
    build(made.recipe(exclusive=WHOLE, router={"features": "tokens"}), tmp_path / "twin")
    found = list(predict(TwinModel.from_pretrained(tmp_path / "twin"), rows, expert="ag", max_new_tokens=8))
    for text, answer in zip(free, found, strict=True):
        written, stopped, _ = text.partition(stop)
        assert answer["continuation"] == (written + stopped)
        assert answer["stop_reason"] == ("stop" if stopped else answer["stop_reason"])
    assert "stop" in {answer["stop_reason"] for answer in found}


def test_sampling_of_an_expert_is_its_own_and_not_of_predict(writers: tuple[Family, Path]) -> None:
    model = TwinModel.from_pretrained(writers[1])
    assert model.own_of("ag").generation.temperature == 0.5
    x = tiny.tokenizer("left")(["w30 w31"] * 30, return_tensors="pt")
    torch.manual_seed(0)
    drawn = model.generate(**x, expert="ag", max_new_tokens=3, pad_token_id=0)
    assert len({tuple(row) for row in drawn.tolist()}) > 1
    assert len({tuple(row) for row in model.generate(**x, expert="sms", max_new_tokens=3).tolist()}) == 1


def test_only_what_differs_is_kept(writers: tuple[Family, Path], twin: Callable[..., Path]) -> None:
    kept = {name: sorted(p.name for p in (writers[1] / "experts" / name / "own").iterdir()) for name in tiny.EXPERTS}
    assert kept["ag"] == kept["sms"] == ["generation_config.json"]
    assert kept["trec"] == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in ("llama", "bert"):
        assert list(twin(name).glob("experts/*/own")) == []
    artifact = TwinArtifact.open(writers[1])
    assert artifact.verify() > 0
    assert artifact.bytes_per_expert()["trec"]["heads"] > 0


@pytest.mark.parametrize("expert", ["ag", "trec", "sms"])
def test_export_of_one_expert_is_that_expert(writers: tuple[Family, Path], tmp_path: Path, expert: str) -> None:
    made, twin = writers
    export(twin, tmp_path / "out", to="dense", expert=expert)
    expected = own_texts(made, expert, TEXTS, base=expert != "trec")
    assert own_texts(Family(tmp_path), "out", TEXTS) == expected
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(made.root / "trec" if expert == "trec" else made.base)
    assert [tokenizer(text).input_ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]
    assert tokenizer.chat_template == expected.chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == {"ag": list(range(3, 34)), "sms": [3, *range(34, 64)], "trec": 3}[expert]


def test_adapters_leave_with_what_is_their_experts_own(writers: tuple[Family, Path], tmp_path: Path) -> None:
    export(writers[1], tmp_path / "out", to="peft")
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "trec")("W5").input_ids == [2, 5]
    assert GenerationConfig.from_pretrained(tmp_path / "out" / "ag").repetition_penalty == 1.5


def test_replaced_expert_brings_its_own(writers: tuple[Family, Path], tmp_path: Path) -> None:
    made, twin = writers
    rows = made.root / "trec.jsonl"
    replace(twin, "trec", model=made.root / "ag", router_data=rows, out=tmp_path / "new")
    model = TwinModel.from_pretrained(tmp_path / "new")
    assert not model.own_of("trec").reads
    assert model.own_of("trec").generation.repetition_penalty == 1.5
    assert model.own_of("sms").generation.eos_token_id == [3, *range(34, 64)]


def test_adapter_ends_with_its_own_tokenizers_end_token_too(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer("left").save_pretrained(tmp_path / "base")
    for name in tiny.EXPERTS:
        tiny.make_adapter(tmp_path, name, tiny.llama(), tiny.text_rows(name), r=2, target_modules=["q_proj"])
    mine = tiny.tokenizer("left")
    mine.eos_token = "w40"
    mine.save_pretrained(tmp_path / "sms")
    (tmp_path / "sms" / "config.json").unlink(missing_ok=True)
    build(Family(tmp_path).recipe(exclusive=WHOLE, router={"features": "tokens"}), tmp_path / "twin")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    assert model.own_of("sms").generation.eos_token_id == [3, 40]
    assert model.own_of("ag") == Own()


# ---- classifiers


@pytest.mark.parametrize("padding", [0, 9, None])
def test_row_of_a_causal_classifier_does_not_depend_on_its_batch_mates(
    family: Get, tmp_path: Path, padding: int | None
) -> None:
    """Whatever id its config names; the tokenizer pads with 0."""
    base = tiny.llama()
    made = tiny.make_family(tmp_path, base, transformers.LlamaForSequenceClassification)
    for name in tiny.EXPERTS:
        write(made.root / name / "config.json", pad_token_id=padding, id2label={"0": "no", "1": "yes"})
        write(made.root / name / "config.json", num_labels=tiny.LABELS[name])
    made = Family(tmp_path)
    for name, count in tiny.LABELS.items():
        write(made.root / name / "config.json", id2label={str(i): f"{name}{i}" for i in range(count)})
    build(made.recipe(exclusive=WHOLE, router={"features": "tokens"}), tmp_path / "twin")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    found = list(predict(model, [{"text": text} for text in TEXTS], expert="ag"))
    alone = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "ag").eval()
    for text, answer in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            score, label = alone(**tiny.tokenizer()(text, return_tensors="pt")).logits[0].softmax(0).max(0)
        assert (answer["label"], answer["score"]) == (f"ag{int(label)}", pytest.approx(float(score), abs=1e-5))


def test_expert_that_lower_cases_reads_lower_case(family: Get, tmp_path: Path) -> None:
    made = copied(family, "bert", tmp_path)
    lowering().save_pretrained(made.root / "sms")
    build(made.recipe(exclusive=WHOLE), tmp_path / "twin")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    rows = [{"text": text, "text_pair": "W23 w24"} for text in TEXTS]
    own = transformers.AutoModelForSequenceClassification.from_pretrained(made.root / "sms").eval()
    for row, answer in zip(rows, predict(model, rows, expert="sms"), strict=True):
        inputs = AutoTokenizer.from_pretrained(made.root / "sms")(row["text"], row["text_pair"], return_tensors="pt")
        with torch.inference_mode():
            score = own(**inputs).logits[0].softmax(0).max()
        assert answer["score"] == pytest.approx(float(score), abs=1e-5)
    some = rows + [{"text": row["text"]} for name in tiny.EXPERTS for row in tiny.text_rows(name, 4)]
    routed = list(predict(model, some))
    for row, answer in zip(some, routed, strict=True):
        (alone,) = predict(model, [row])
        assert (answer["expert"], answer["label"]) == (alone["expert"], alone["label"])
        assert answer["score"] == pytest.approx(alone["score"], abs=1e-5)
    assert "sms" in {answer["expert"] for answer in routed}


# ---- encoders


SENTENCE: Mapping[str, tuple[dict[str, bool], bool, dict[str, Any]]] = {
    "ag": ({"pooling_mode_cls_token": True}, True, {"do_lower_case": True}),
    "sms": ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, False, {}),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("encoders")
    made = tiny.make_family(root, tiny.bert(), transformers.BertModel)
    for name, (modes, normal, reading) in SENTENCE.items():
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normal else [])]
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        (root / name / "modules.json").write_text(json.dumps(modules))
        (root / name / "1_Pooling").mkdir()
        write(root / name / "1_Pooling" / "config.json", word_embedding_dimension=16, **modes)
        write(root / name / "sentence_bert_config.json", max_seq_length=20, **reading)
    write(root / "sms" / "config_sentence_transformers.json", prompts={"query": "w9 w9 "}, default_prompt_name="query")
    return made


def test_encoder_gives_the_embedding_that_its_modules_make(encoders: Family, tmp_path: Path) -> None:
    build(encoders.recipe(exclusive=WHOLE), tmp_path / "twin")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    for name in tiny.EXPERTS:
        own = transformers.AutoModel.from_pretrained(encoders.root / name).eval()
        for text, answer in zip(TEXTS, predict(model, [{"text": t} for t in TEXTS], expert=name), strict=True):
            read = {"ag": text.lower(), "sms": f"w9 w9 {text}"}.get(name, text)
            with torch.inference_mode():
                states = own(**tiny.tokenizer()(read, return_tensors="pt")).last_hidden_state[0]
            first = states[0] / states[0].norm()
            expected = {"ag": first, "sms": torch.cat([states.amax(0), states.mean(0)])}.get(name, states.mean(0))
            assert answer["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
    export(tmp_path / "twin", tmp_path / "out", to="dense", expert="ag")
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"]
    assert Own.read(tmp_path / "out", tmp_path / "out").normalized


@pytest.mark.parametrize(
    ("modes", "pooled"),
    [
        ({"pooling_mode": "lasttoken"}, [2.0, 4.0]),
        ({"pooling_mode": ["mean_sqrt_len_tokens"]}, [3 / 2**0.5, 3 / 2**0.5]),
        ({"pooling_mode_weightedmean_tokens": True}, [5 / 3, 7 / 3]),
    ],
)
def test_other_ways_to_pool(tmp_path: Path, modes: dict[str, Any], pooled: list[float]) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "1_Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    write(tmp_path / "1_Pooling" / "config.json", **modes)
    states = torch.tensor([[1.0, -1.0], [2.0, 4.0]])
    assert Own.read(tmp_path, tmp_path).pool(states).tolist() == pytest.approx(pooled)


@pytest.mark.parametrize(
    ("modules", "settings", "words"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_cls_token": True}, r"'ag' ends in a Dense \(2_Dense/\)"),
        (["Pooling"], {"pooling_mode": "new"}, r"'ag' ends in a Pooling of another form \(0_Pooling/\)"),
        (["Pooling"], {"pooling_mode_cls_token": True, "include_prompt": False}, "a Pooling of another form"),
    ],
)
def test_modules_that_are_not_applied_are_refused(
    encoders: Family, tmp_path: Path, modules: list[str], settings: dict[str, Any], words: str
) -> None:
    made = Family(Path(shutil.copytree(encoders.root, tmp_path / "models")))
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(modules)]
    (made.root / "ag" / "modules.json").write_text(json.dumps(listed))
    for i, kind in enumerate(modules):
        if kind == "Pooling":
            (made.root / "ag" / f"{i}_{kind}").mkdir(exist_ok=True)
            (made.root / "ag" / f"{i}_{kind}" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(MismatchError, match=words):
        build(made.recipe(exclusive=WHOLE), tmp_path / "twin")
