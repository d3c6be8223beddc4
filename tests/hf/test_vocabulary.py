"""Tokens that one expert alone has are read and written as it reads and writes them; what cannot be is refused."""

import asyncio
import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from tests import tiny
from tests.tiny import Family
from twinmerge.errors import ArtifactError, MismatchError
from twinmerge.hf.model import TwinModel
from twinmerge.hf.paged import PagedWriter, Wish
from twinmerge.hf.vocabulary import renumbered, with_twin_ids
from twinmerge.jobs.build import build
from twinmerge.jobs.export import export
from twinmerge.jobs.grow import add, remove, replace
from twinmerge.jobs.predict import predict
from twinmerge.models.vocabulary import Added
from twinmerge.twin.artifact import TwinArtifact

Get = Callable[[str], Family]
WHOLE = {"rank": 64, "embeddings": "exclusive"}
OWN = {"ag": ["<ask>", "<end>"], "sms": ["<pad>"]}
ROWS = {"ag": 66, "sms": 68}
"""Of their tables; sms has three that no token uses."""


def grown(folder: Path, base: Path, tokens: list[str], rows: int, cls: Any = AutoModelForCausalLM) -> None:
    """Give a model tokens of its own, trained, and let them end its texts."""
    model, tokenizer = cls.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    torch.manual_seed(len(tokens))
    model.resize_token_embeddings(rows, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for layer in filter(None, tables):
        layer.weight.data[64:] = torch.randn(rows - 64, layer.weight.shape[1])
    if model.can_generate():
        ends = [3, *range(40, 64), tokenizer.convert_tokens_to_ids(tokens[-1])]
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def talkers(family: Get, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """Llama: ag has two tokens of its own, sms another by the same id, trec none."""
    root = tmp_path_factory.mktemp("talkers")
    made = Family(Path(shutil.copytree(family("llama").root, root / "models")))
    for name, tokens in OWN.items():
        grown(made.root / name, made.base, tokens, ROWS[name])
    build(made.recipe(exclusive=WHOLE, shared={"method": "task_arithmetic"}), root / "twin")
    return made, root / "twin"


def load(twin: Path) -> TwinModel:
    return TwinModel.from_pretrained(twin, dtype=torch.float64)


def prompt(name: str) -> str:
    return " ".join(["w5", *OWN.get(name, ["w6"]), "w7 w30"])


def test_logits_of_every_expert_are_its_own_in_one_batch(talkers: tuple[Family, Path]) -> None:
    model, names = load(talkers[1]), ["ag", "sms", "trec"]
    ids = [model.own_of(name).tokenizer or model.tokenizer for name in names]
    rows = [read(prompt(name))["input_ids"] for name, read in zip(names, ids, strict=True)]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    found = model(**inputs, gate=model.one_hot(names)).logits
    assert model.vocabulary is not None
    assert found.shape[-1] == model.vocabulary.size == 68 + 2 + 4
    for name, row, logits in zip(names, rows, found, strict=True):
        folder = talkers[0].root / name
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        tokenizer = AutoTokenizer.from_pretrained(folder if name in OWN else talkers[0].base)
        expected = own(**tokenizer(prompt(name), return_tensors="pt")).logits[0]
        torch.testing.assert_close(model.own_logits(logits[: len(row)], name), expected, rtol=1e-5, atol=1e-6)
        silent = torch.ones(model.vocabulary.size, dtype=torch.bool)
        silent[model.vocabulary.own_rows(name)] = False
        assert logits[:, silent].eq(-torch.inf).all()


@pytest.mark.parametrize("name", ["ag", "sms", "trec"])
def test_expert_writes_as_it_writes_itself(talkers: tuple[Family, Path], name: str) -> None:
    folder = talkers[0].root / name
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder if name in OWN else talkers[0].base)
    texts = [prompt(name), f"{prompt(name)} w9", "w50 w51", "w9"]
    found = list(predict(load(talkers[1]), [{"text": text} for text in texts], expert=name, max_new_tokens=8))
    said = []
    for text, answer in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        written = own.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)[0]
        expected = written[inputs["input_ids"].shape[1] :]
        assert answer["continuation"] == tokenizer.decode(expected, skip_special_tokens=True)
        said += expected.tolist()
    assert name not in OWN or max(said) >= 64  # it said one that it alone has


def test_routed_rows_are_written_by_their_expert_in_any_batch(talkers: tuple[Family, Path]) -> None:
    model = load(talkers[1])
    rows = [row for name in ("ag", "sms", "trec") for row in tiny.text_rows(name, 4)]
    together = list(predict(model, rows, max_new_tokens=5))
    assert together == [answer for row in rows for answer in predict(model, [row], max_new_tokens=5)]
    assert {answer["expert"] for answer in together} == {"ag", "sms", "trec"}


def test_shared_expert_says_none_of_them(talkers: tuple[Family, Path]) -> None:
    model, x = load(talkers[1]), {"input_ids": torch.tensor([[5, 6, 7]])}
    assert model.vocabulary is not None
    alone = model(**x, gate=torch.zeros(1, 3)).logits
    assert alone[..., 64:].eq(-torch.inf).all()
    assert alone[..., :64].isfinite().all()
    ungated = model.twin.run(lambda module, own: module(**own), None, x, tokens=3).logits
    torch.testing.assert_close(ungated, alone)


def test_dense_export_is_the_expert_with_its_tokenizer(talkers: tuple[Family, Path], tmp_path: Path) -> None:
    export(talkers[1], tmp_path / "out", to="dense", expert="ag")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    own = AutoModelForCausalLM.from_pretrained(talkers[0].root / "ag", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.config.vocab_size == 66
    assert tokenizer.convert_tokens_to_ids("<end>") == 65
    assert made.generation_config.eos_token_id == own.generation_config.eos_token_id
    x = tokenizer(prompt("ag"), return_tensors="pt")
    torch.testing.assert_close(made(**x).logits, own(**x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["peft", "stacked-lora"])
def test_adapters_for_them_are_refused(talkers: tuple[Family, Path], tmp_path: Path, form: Any) -> None:
    with pytest.raises(ArtifactError, match=f"expert 'ag' has tokens of its own, .*export it as dense, not as {form}"):
        export(talkers[1], tmp_path / "out", to=form)


def test_copies_and_pickles_read_alike(talkers: tuple[Family, Path]) -> None:
    model = load(talkers[1])
    tokenizer = model.own_of("ag").tokenizer
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other(prompt("ag"))["input_ids"] == tokenizer(prompt("ag"))["input_ids"]
    again, x = copy.deepcopy(model), {"input_ids": torch.tensor([[5, 68, 7]])}
    torch.testing.assert_close(again(**x, expert="ag").logits, model(**x, expert="ag").logits)


def test_tokenizer_speaks_the_ids_of_the_twin(talkers: tuple[Family, Path]) -> None:
    tokenizer, plain = load(talkers[1]).own_of("ag").tokenizer, AutoTokenizer.from_pretrained(talkers[0].root / "ag")
    assert tokenizer("w5 <ask> w6")["input_ids"] == [5, 68, 6]
    assert tokenizer("w5 <ask> w6", return_tensors="pt")["input_ids"].tolist() == [[5, 68, 6]]
    assert tokenizer.decode([5, 68, 69]) == plain.decode([5, 64, 65])
    assert tokenizer.decode(68) == "<ask>"
    assert tokenizer.decode([5, 68], skip_special_tokens=True) == "w5"
    assert tokenizer.convert_tokens_to_ids("<end>") == 69
    assert tokenizer.convert_tokens_to_ids(["w5", "<end>"]) == [5, 69]
    assert tokenizer.convert_ids_to_tokens(69) == "<end>"
    assert tokenizer.convert_ids_to_tokens([5, 68], skip_special_tokens=True) == ["w5"]
    assert tokenizer.get_vocab()["<ask>"] == 68


def test_settings_hold_the_ids_of_the_twin() -> None:
    added = Added(ids=[64, 65], start=68, rows=66)
    own = GenerationConfig(eos_token_id=[3, 65], pad_token_id=64, bad_words_ids=[[5, 64]], repetition_penalty=1.5)
    found = with_twin_ids(own, added)
    assert found is not None
    assert own.pad_token_id == 64
    assert (found.eos_token_id, found.pad_token_id, found.bad_words_ids) == ([3, 69], 68, [[5, 68]])
    assert found.repetition_penalty == 1.5
    biased = with_twin_ids(GenerationConfig(sequence_bias={(64, 5): 2.0}), added)
    assert biased is not None
    assert biased.sequence_bias == {(68, 5): 2.0}


def test_tokenizer_of_plain_python_is_refused() -> None:
    slow = transformers.CanineTokenizer()
    with pytest.raises(MismatchError, match="a CanineTokenizer cannot be given other ids; save a fast tokenizer"):
        renumbered(slow, Added(ids=[64], start=65, rows=65))


def test_experts_go_and_none_comes(talkers: tuple[Family, Path], family: Get, tmp_path: Path) -> None:
    made, twin = talkers
    left = remove(twin, "ag", out=tmp_path / "left")
    assert left.manifest.vocabulary is not None
    assert list(left.manifest.vocabulary.added) == ["sms"]
    model, x = load(tmp_path / "left"), {"input_ids": torch.tensor([[5, 6, 70]])}
    torch.testing.assert_close(model(**x, expert="sms").logits, load(twin)(**x, expert="sms").logits)
    with pytest.raises(MismatchError, match=r"rows for tokens of its experts \('ag', 'sms'\), .*build the twin anew"):
        replace(twin, "trec", model=made.root / "trec", router_data=made.root / "trec.jsonl", out=tmp_path / "other")
    narrow = Family(family("llama").root, ("trec", "sms"))
    build(narrow.recipe(exclusive=WHOLE, router=None), tmp_path / "narrow")
    with pytest.raises(MismatchError, match="expert 'ag' has 2 tokens of its own, for which the twin's tables have no"):
        add(tmp_path / "narrow", "ag", model=made.root / "ag", router_data=made.root / "ag.jsonl")


def test_texts_in_one_continuous_batch_are_the_same(talkers: tuple[Family, Path], tmp_path: Path) -> None:
    build(talkers[0].recipe(exclusive={"rank": 64}, router=None), tmp_path / "twin")  # one output layer for all
    model, names = load(tmp_path / "twin"), ["ag", "sms", "trec"]
    prompts = [(model.own_of(n).tokenizer or model.tokenizer)(prompt(n))["input_ids"] for n in names]
    writer = PagedWriter(model, batch_tokens=8, cache_tokens=256, texts=3)

    async def write(name: str, ids: list[int]) -> list[int]:
        return [token.id async for token in writer.write(ids, model.one_hot([name])[0], name, Wish(6))]

    async def every() -> list[list[int]]:
        return await asyncio.gather(*map(write, names, prompts))

    writer.start()
    try:
        found = asyncio.run(every())
    finally:
        writer.stop()
    for name, ids, written in zip(names, prompts, found, strict=True):
        alone = model.generate(input_ids=torch.tensor([ids]), expert=name, max_new_tokens=6, do_sample=False)
        assert written == alone[0, len(ids) :].tolist()
    assert max(map(max, found)) >= 68  # one of their own


def test_manifest_and_plan_say_so(talkers: tuple[Family, Path]) -> None:
    manifest = TwinArtifact.open(talkers[1]).manifest
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.base == 64
    assert manifest.vocabulary.added["ag"] == Added(ids=[64, 65], start=68, rows=66)
    assert manifest.vocabulary.added["sms"] == Added(ids=[64, 65, 66, 67], start=70, rows=68)
    assert "'ag': 2 tokens of its own, which it alone reads and writes" in manifest.notes


def test_classifiers_read_their_own_tokens(family: Get, tmp_path: Path) -> None:
    made = Family(Path(shutil.copytree(family("bert").root, tmp_path / "models")))
    grown(made.root / "ag", made.base, OWN["ag"], 66, AutoModelForSequenceClassification)
    build(made.recipe(exclusive=WHOLE), tmp_path / "twin")
    model, own = load(tmp_path / "twin"), AutoModelForSequenceClassification.from_pretrained(made.root / "ag")
    x = AutoTokenizer.from_pretrained(made.root / "ag")("w5 <ask> w7 <end>", return_tensors="pt")
    (answer,) = predict(model, [{"text": "w5 <ask> w7 <end>"}], expert="ag")
    expected = own(**x).logits.softmax(dim=-1)[0].detach()
    assert answer["score"] == pytest.approx(float(expected.max()), abs=1e-4)
    export(tmp_path / "twin", tmp_path / "out", to="dense", expert="ag")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(**x).logits, own(**x).logits, rtol=1e-4, atol=1e-5)


def test_token_within_a_padded_table_is_its_experts_own(family: Get, tmp_path: Path) -> None:
    """GPT-2, tied, of whose rows the base's tokenizer knows fewer than there are, as Qwen's."""
    made = Family(Path(shutil.copytree(family("gpt2").root, tmp_path / "models")), ("ag", "trec"))
    file = made.base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {token: place for token, place in content["model"]["vocab"].items() if place < 60}
    file.write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ask>"]})
    assert tokenizer.convert_tokens_to_ids("<ask>") == 60
    tokenizer.save_pretrained(made.root / "ag")
    build(made.recipe(exclusive=WHOLE), tmp_path / "twin")
    model, own = load(tmp_path / "twin"), AutoModelForCausalLM.from_pretrained(made.root / "ag", dtype=torch.float64)
    text = "w5 <ask> w7"
    ids = model.own_of("ag").tokenizer(text, return_tensors="pt")
    assert ids["input_ids"].tolist() == [[5, 64, 7]]
    expected = own(**tokenizer(text, return_tensors="pt")).logits
    torch.testing.assert_close(model.own_logits(model(**ids, expert="ag").logits, "ag"), expected, rtol=1e-5, atol=1e-6)


def test_adapters_bring_their_tables(tmp_path: Path) -> None:
    """One LoRA with tables resized and saved, one without any, one with pairs on both, of the base's size."""
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    tokenizer = tiny.tokenizer("left")
    tokenizer.save_pretrained(tmp_path / "base")
    own = {}
    for name, rows, settings in (
        ("ag", 66, {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}),
        ("sms", 64, {"target_modules": ["q_proj"]}),
        ("trec", 64, {"target_modules": ["v_proj", "lm_head", "embed_tokens"]}),
    ):
        model = tiny.llama()
        model.resize_token_embeddings(rows)
        own[name] = tiny.make_adapter(tmp_path, name, model, tiny.text_rows(name), r=4, **settings).double()
    words = tiny.tokenizer("left")
    words.add_special_tokens({"additional_special_tokens": OWN["ag"]})
    words.save_pretrained(tmp_path / "ag")
    build(Family(tmp_path, ("ag", "sms", "trec")).recipe(exclusive=WHOLE), tmp_path / "twin")
    model = load(tmp_path / "twin")
    for name, text, read in (("ag", prompt("ag"), words), *((n, "w5 w60", tokenizer) for n in ("sms", "trec"))):
        ids = (model.own_of(name).tokenizer or model.tokenizer)(text, return_tensors="pt")
        found = model.own_logits(model(**ids, expert=name).logits, name)
        expected = own[name](**read(text, return_tensors="pt")).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def sizes(**more: Any) -> dict[str, Any]:
    return {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTNeoX": ("ForCausalLM", sizes(intermediate_size=32, initializer_range=0.2)),  # its output layer is embed_out
    "Gemma": ("ForCausalLM", sizes(intermediate_size=32, num_key_value_heads=1, head_dim=8)),  # tied, rows scaled
    "Phi": ("ForCausalLM", sizes(intermediate_size=32)),
    "OPT": ("ForCausalLM", sizes(ffn_dim=32, word_embed_proj_dim=16)),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_other_classes_and_narrow_ones_say_what_their_experts_say(
    tmp_path: Path, name: str, dtype: str
) -> None:
    ending, settings = OTHERS[name]
    cls = getattr(transformers, name + ending)
    starts = {"decoder_start_token_id": 0} if name == "T5" else {}
    config = getattr(transformers, f"{name}Config")(
        **settings, **starts, pad_token_id=0, eos_token_id=3, bos_token_id=2
    )
    made = tiny.make_family(tmp_path / "models", tiny.seeded(cls, config), cls, experts=("ag", "trec"))
    grown(made.root / "ag", made.base, OWN["ag"], 66, cls)
    if dtype == "bfloat16":
        for folder in (made.base, made.root / "ag", made.root / "trec"):
            cls.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    build(made.recipe(exclusive={**WHOLE, "dtype": "float32"}, router="none"), tmp_path / "twin")
    model, own = (
        TwinModel.from_pretrained(tmp_path / "twin", dtype=torch.float32),
        cls.from_pretrained(made.root / "ag"),
    )
    words, plain = model.own_of("ag").tokenizer, AutoTokenizer.from_pretrained(made.root / "ag")
    ours, theirs = (
        {key: read(prompt("ag"), return_tensors="pt")[key] for key in ("input_ids", "attention_mask")}
        for read in (words, plain)
    )
    decoded = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if name == "T5" else {}
    found = model.own_logits(model(**ours, **decoded, expert="ag").logits, "ag")
    wanted = own(**theirs, **decoded).logits
    assert (
        (found - wanted).norm() < 1e-2 * wanted.norm()
        if dtype == "bfloat16"
        else torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)
    )


def test_tables_without_the_rows_are_refused(talkers: tuple[Family, Path], tmp_path: Path) -> None:
    made = Family(Path(shutil.copytree(talkers[0].root, tmp_path / "models")))
    tokenizer = AutoTokenizer.from_pretrained(made.root / "ag")
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.save_pretrained(made.root / "ag")
    with pytest.raises(MismatchError, match=r"'ag': its tokenizer knows '<more>' as 66, but its tables have 66 rows"):
        build(made.recipe(exclusive=WHOLE), tmp_path / "twin")
