"""Experts: whatever their files look like, they answer to the base's names; what does not fit is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.tiny import Family, rewrite
from twinmerge.errors import CheckpointError, MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.classes import LIBRARY
from twinmerge.models.adapter import AdapterExpert
from twinmerge.models.expert import open_expert, shared_model
from twinmerge.models.source import Expert, open_model

Get = Callable[[str], Family]


def opened(folder: Path, base: Path, conv1d: set[str] | None = None) -> Expert:
    model = open_model(base, LIBRARY)
    return open_expert(folder.name, folder, model, shared_model(model, [folder], LIBRARY), conv1d or set(), LIBRARY)


def copied(family: Family, name: str, folder: Path) -> Path:
    shutil.copytree(family.root / name, folder / name)
    return folder / name


# ---- full fine-tunes


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", ["classifier.bias", "classifier.weight"]),
        ("distilbert", ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"]),
        (
            "roberta",
            [
                "classifier.dense.bias",
                "classifier.dense.weight",
                "classifier.out_proj.bias",
                "classifier.out_proj.weight",
            ],
        ),
        ("llama", []),
        ("gpt2", []),
    ],
)
def test_names_of_an_expert_are_matched_with_those_of_the_base(family: Get, name: str, head: list[str]) -> None:
    found = family(name)
    own = set(Checkpoint.open(found.base).specs)
    if name == "roberta":  # its head for masked words is no expert's
        own = {parameter.removeprefix("roberta.") for parameter in own if parameter.startswith("roberta.")}
    expert = opened(found.root / "sms", found.base)
    assert expert.stored.keys() == own
    assert all(stored.endswith(parameter) for parameter, stored in expert.stored.items())
    assert sorted(expert.head) == head
    assert not expert.is_adapter
    assert expert.factors(next(iter(expert.stored))) is None


def test_task_vector_is_expert_minus_base(family: Get) -> None:
    found = family("bert")
    base, expert = Checkpoint.open(found.base), opened(found.root / "sms", found.base)
    name = "encoder.layer.0.output.dense.weight"
    stored = Checkpoint.open(found.root / "sms").read(f"bert.{name}")
    assert torch.equal(expert.task_vector(name, base.read(name)), stored - base.read(name))


def test_base_with_a_head_serves_experts_without_one(family: Get, tmp_path: Path) -> None:
    found = family("bert")
    expert = opened(found.base, found.root / "trec")  # the other way round
    assert expert.stored["pooler.dense.weight"] == "pooler.dense.weight"
    assert len(expert.stored) == 39
    assert not expert.head


@pytest.mark.parametrize("base", ["trec", "sms"])
def test_head_is_no_parameter_whatever_its_shape(family: Get, base: str) -> None:
    found = family("bert")
    expert = opened(found.root / "sms", found.root / base)  # of the same class; two labels and three, or both three
    assert "classifier.weight" not in expert.stored
    assert sorted(expert.head) == ["classifier.bias", "classifier.weight"]
    assert expert.read_head()["classifier.weight"].shape == (3, 16)


def test_integer_buffers_may_be_there_or_not(family: Get, tmp_path: Path) -> None:
    found = family("bert")
    folder = copied(found, "sms", tmp_path)
    rewrite(folder / "model.safetensors", lambda t: {**t, "bert.embeddings.position_ids": torch.arange(32)[None]})
    assert "embeddings.position_ids" not in opened(folder, found.base).stored
    assert opened(found.root / "sms", folder).stored.keys() == Checkpoint.open(found.base).specs.keys()


# ---- what does not fit


def test_expert_of_more_layers_is_refused(family: Get, tmp_path: Path) -> None:
    config = transformers.BertConfig.from_pretrained(family("bert").base, num_hidden_layers=3)
    tiny.seeded(transformers.BertForSequenceClassification, config).save_pretrained(tmp_path / "deep")
    with pytest.raises(
        MismatchError, match=r"'deep' has 16 tensors that the base lacks, first 'bert\.encoder\.layer\.2\."
    ):
        opened(tmp_path / "deep", family("bert").base)


def test_class_whose_head_no_name_tells_is_refused(tmp_path: Path) -> None:
    """T5 answers questions in a class that holds encoder, decoder and head side by side."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    tiny.seeded(transformers.T5Model, config).save_pretrained(tmp_path / "base")
    tiny.seeded(transformers.T5ForQuestionAnswering, config).save_pretrained(tmp_path / "qa")
    for base in ("base", "qa"):
        with pytest.raises(MismatchError, match="'qa' is a T5ForQuestionAnswering, in which no name tells the head"):
            opened(tmp_path / "qa", tmp_path / base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "bert.encoder.layer.0.output.dense.weight"},
            "expert 'sms' lacks 1 of 41 parameters, first 'encoder.layer.0.output.dense.weight'; was it fine-tuned",
        ),
        (
            lambda t: {**t, "bert.encoder.layer.2.output.dense.weight": torch.zeros(2)},
            "expert 'sms' has 1 tensors that the base lacks, first 'bert.encoder.layer.2.output.dense.weight'",
        ),
        (
            lambda t: {**t, "bert.embeddings.word_embeddings.weight": torch.zeros(70, 16)},
            "expert 'sms': 'bert.embeddings.word_embeddings.weight' has shape [70, 16], by config.json it must be "
            "[64, 16]; one of them is wrong",
        ),
        (
            lambda t: {**t, "bert.pooler.dense.bias": torch.zeros(0)},
            "model.safetensors holds 1 tensors without values, first 'bert.pooler.dense.bias': DeepSpeed ZeRO-3 saved",
        ),
        (lambda t: {"something.else": torch.zeros(3)}, "expert 'sms' lacks 41 of 41 parameters"),
        (lambda t: {"x": torch.zeros(3)}, "expert 'sms' lacks 41 of 41 parameters"),
    ],
)
def test_expert_that_does_not_fit_is_named(
    family: Get, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    found = family("bert")
    folder = copied(found, "sms", tmp_path)
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(MismatchError, match=re.escape(message)):
        opened(folder, found.base)


def test_expert_of_another_architecture_is_named(family: Get) -> None:
    with pytest.raises(
        MismatchError, match="expert 'sms' is a 'distilbert' model, the base is 'bert'; experts must be"
    ):
        opened(family("distilbert").root / "sms", family("bert").base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_no_number_is_named(family: Get, tmp_path: Path, value: float) -> None:
    found = family("bert")
    folder = copied(found, "sms", tmp_path)
    rewrite(
        folder / "model.safetensors", lambda t: {k: v.index_fill(0, torch.tensor([1]), value) for k, v in t.items()}
    )
    expert = opened(folder, found.base)
    with pytest.raises(CheckpointError, match=r"expert 'sms': 'bert\.pooler\.dense\.bias' in .* has 1 NaN or Inf"):
        expert.task_vector("pooler.dense.bias", torch.zeros(16))
    with pytest.raises(CheckpointError, match=r"expert 'sms': 'classifier\.bias' in .* has 1 NaN or Inf values"):
        expert.read_head()


# ---- LoRA adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, dict[str, PreTrainedModel]]:
    return tiny.adapter_family(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("name", tiny.EXPERTS)
def test_task_vector_of_an_adapter_is_what_peft_merges(
    adapters: tuple[Family, dict[str, PreTrainedModel]], name: str
) -> None:
    family, merged = adapters
    base, expert = Checkpoint.open(family.base), opened(family.root / name, family.base)
    assert expert.is_adapter
    expected = merged[name].bert.state_dict()
    moved = 0
    for parameter in base.specs:  # matrices through factors; biases and norms that were trained whole
        vector = expert.task_vector(parameter, base.read(parameter))
        difference = expected[parameter] - base.read(parameter)
        assert torch.allclose(vector, difference, atol=1e-6)  # PEFT adds in float32 and rounds
        moved += bool(difference.any())
        factors = expert.factors(parameter)
        if factors is not None:
            assert torch.allclose(factors.dense().reshape(difference.shape), difference, atol=1e-6)
            assert factors.rank <= 4
    assert moved == {"trec": 4, "sms": 19, "ag": 19}[name]


@pytest.mark.parametrize("name", tiny.EXPERTS)
def test_head_of_an_adapter_is_that_of_its_class(
    adapters: tuple[Family, dict[str, PreTrainedModel]], name: str
) -> None:
    family, merged = adapters
    expert = opened(family.root / name, family.base)
    head = expert.read_head()
    assert sorted(head) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(head["classifier.weight"], merged[name].classifier.weight)
    assert expert.config["architectures"] == ["BertForSequenceClassification"]
    assert len(expert.config["id2label"]) == tiny.LABELS[name]
    assert expert.config["hidden_size"] == 16


def test_config_beside_an_adapter_says_what_its_head_is(
    adapters: tuple[Family, dict[str, PreTrainedModel]], tmp_path: Path
) -> None:
    family, merged = adapters
    folder = copied(family, "sms", tmp_path)
    merged["sms"].config.save_pretrained(folder)
    found, beside = opened(folder, family.base).config, json.loads((folder / "config.json").read_text())
    assert beside["architectures"] == ["BertModel"]  # as transformers keeps it, of the folder that was loaded
    assert found == {**beside, "architectures": ["BertForSequenceClassification"]}


def test_adapter_of_conv1d_layers_is_transposed(family: Get, tmp_path: Path) -> None:
    found = family("gpt2")
    base = Checkpoint.open(found.base)
    model = transformers.GPT2LMHeadModel.from_pretrained(found.base)
    merged = tiny.make_adapter(tmp_path, "sms", model, r=2, target_modules=["c_attn", "wpe"], fan_in_fan_out=True)
    names = {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight", "transformer.wpe.weight"}
    expert = opened(tmp_path / "sms", found.base, names)
    assert isinstance(expert, AdapterExpert)
    assert set(expert.pairs) == names
    assert not expert.head
    for name in names:
        difference = merged.state_dict()[name] - base.read(name)
        assert torch.allclose(expert.task_vector(name, base.read(name)), difference, atol=1e-6)


def test_adapter_of_a_convolution_is_flattened(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    tiny.seeded(transformers.ViTModel, config).save_pretrained(tmp_path / "base")
    model = transformers.ViTModel.from_pretrained(tmp_path / "base")
    merged = tiny.make_adapter(tmp_path, "sms", model, r=2, target_modules=["projection"])
    name = "embeddings.patch_embeddings.projection.weight"
    base = Checkpoint.open(tmp_path / "base")
    vector = opened(tmp_path / "sms", tmp_path / "base").task_vector(name, base.read(name))
    assert vector.shape == (16, 3, 4, 4)
    assert torch.allclose(vector, merged.state_dict()[name] - base.read(name), atol=1e-6)


def test_adapter_trained_on_the_backbone_serves_a_base_with_a_head(family: Get, tmp_path: Path) -> None:
    found = family("bert")
    model = transformers.BertModel.from_pretrained(found.base)
    tiny.make_adapter(tmp_path, "sms", model, r=2, target_modules=["query"])
    expert = opened(tmp_path / "sms", found.root / "trec")
    assert isinstance(expert, AdapterExpert)
    assert sorted(expert.pairs) == [f"encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)]


# ---- adapters that do not fit


def changed(
    adapters: tuple[Family, dict[str, PreTrainedModel]], folder: Path, name: str = "trec", **settings: object
) -> Path:
    copy = copied(adapters[0], name, folder)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return copy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"adapter_config\.json is not valid JSON: "),
        ("[]", r"adapter_config\.json must hold a JSON object, found list"),
    ],
)
def test_damaged_adapter_config_is_named(
    adapters: tuple[Family, dict[str, PreTrainedModel]], tmp_path: Path, content: str, message: str
) -> None:
    folder = changed(adapters, tmp_path)
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        opened(folder, adapters[0].base)


def test_adapter_without_weights_is_named(adapters: tuple[Family, dict[str, PreTrainedModel]], tmp_path: Path) -> None:
    folder = changed(adapters, tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not exist"):
        opened(folder, adapters[0].base)


@pytest.mark.parametrize(
    "change", [lambda k: k.replace("layer.0", "layer.7"), lambda k: k.replace("query.lora_B", "q.lora_B")]
)
def test_adapter_of_layers_the_base_lacks_is_named(
    adapters: tuple[Family, dict[str, PreTrainedModel]], tmp_path: Path, change: Callable[[str], str]
) -> None:
    folder = changed(adapters, tmp_path)
    rewrite(folder / "adapter_model.safetensors", lambda t: {change(k): v for k, v in t.items()})
    with pytest.raises(MismatchError, match=r"adapter 'trec' trains '.*', which the base lacks; was it trained"):
        opened(folder, adapters[0].base)


def test_adapter_of_a_wider_model_is_named(adapters: tuple[Family, dict[str, PreTrainedModel]], tmp_path: Path) -> None:
    folder = changed(adapters, tmp_path)
    rewrite(
        folder / "adapter_model.safetensors",
        lambda t: {k: torch.zeros(len(v), 20) if "lora_A" in k else v for k, v in t.items()},
    )
    message = r"adapter 'trec': the pair \[16, 4\] x \[4, 20\] does not fit '.*' \[16, 16\]; was it trained on the same"
    with pytest.raises(MismatchError, match=message):
        opened(folder, adapters[0].base)


def test_head_of_no_known_class_is_named(adapters: tuple[Family, dict[str, PreTrainedModel]], tmp_path: Path) -> None:
    folder = changed(adapters, tmp_path, name="ag", auto_mapping=None)
    message = (
        r"adapter 'ag' holds '.*classifier\.bias', which is neither .* nor a tensor of a BertModel; put the config"
    )
    with pytest.raises(MismatchError, match=message):
        opened(folder, adapters[0].base)


def test_factor_that_holds_no_numbers_is_named(
    adapters: tuple[Family, dict[str, PreTrainedModel]], tmp_path: Path
) -> None:
    folder = changed(adapters, tmp_path)
    rewrite(folder / "adapter_model.safetensors", lambda t: {k: v * float("nan") for k, v in t.items()})
    expert = opened(folder, adapters[0].base)
    with pytest.raises(CheckpointError, match=r"expert 'trec': '.*query\.lora_A\.weight' in .* has 64 NaN or Inf"):
        expert.factors("encoder.layer.0.attention.self.query.weight")
