"""What a model refuses, and what it takes from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from tests.hf.test_model import Get, Twins, batch, stacked
from tests.tiny import Family, random_gate, rewrite
from twinmerge.errors import ArtifactError, GateError, MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.heads import load_head
from twinmerge.hf.loading import backbone_from, load_backbone, load_tokenizer, model_class
from twinmerge.hf.model import TwinModel
from twinmerge.tensors.parts import Dense

# ---- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate": torch.ones(2, 3)}, r"gate must be \(batch, expert\) = \(1, 3\), found \(2, 3\)"),
        ({"gate": torch.ones(1, 2)}, r"gate must be \(batch, expert\) = \(1, 3\), found \(1, 2\)"),
        ({"gate": torch.ones(3)}, r"gate must be \(batch, expert\) = \(1, 3\), found \(3,\)"),
        ({"gate": torch.tensor([[0.1, float("nan"), 0.2]])}, "gate must be finite, found NaN or Inf"),
        ({"gate": torch.tensor([[0.1, float("inf"), 0.2]])}, "gate must be finite, found NaN or Inf"),
        ({"expert": "smss"}, "unknown expert 'smss'; this twin has ag, sms, trec"),
        ({"expert": ["sms", "ag"]}, "there must be one expert or one a row, found 2 for 1 rows"),
        ({"gate": torch.ones(1, 3), "expert": "x"}, "unknown expert 'x'; this twin has ag, sms, trec"),
    ],
)
def test_gate_that_does_not_fit_is_refused(twin: Twins, given: dict[str, Any], message: str) -> None:
    model = TwinModel.from_pretrained(twin("llama"))
    for call in (model, model.generate):
        if call == model.generate and len(given) == 2:
            continue  # there a gate needs no name
        with pytest.raises(GateError, match=message) as caught:
            call(**batch("w5"), **given)
        assert caught.value.exit_code == 2


def test_integer_gate_is_a_gate(twin: Twins) -> None:
    model, x = TwinModel.from_pretrained(twin("bert")), batch("w5 w6")
    found = model(**x, gate=torch.tensor([[0, 1, 0]]))
    assert torch.allclose(stacked(found.logits), stacked(model(**x, expert="sms").logits), atol=1e-6)


def test_materialised_gate_must_fit_too(twin: Twins) -> None:
    with pytest.raises(GateError, match=r"gate must be \(batch, expert\) = \(1, 3\), found \(1, 2\)"):
        TwinModel.from_pretrained(twin("bert")).materialize(torch.ones(2))


def test_call_without_tensors_is_refused(twin: Twins) -> None:
    with pytest.raises(GateError, match=r"inputs must hold at least one tensor, \(batch, \.\.\.\)"):
        TwinModel.from_pretrained(twin("bert"))(expert="sms")


def test_twin_without_a_router_needs_a_gate_or_an_expert(tmp_path: Path) -> None:
    model = TwinModel(tiny.bert(), {"a": {}, "b": {}})
    for call in (model, model.route, model.features):
        with pytest.raises(GateError, match="this twin has no router; give a gate or an expert"):
            call(**batch("w5"))


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [("nothing", 4, "none of that name"), ("pooler.dense.bias", 4, r"one of shape \(16,\)")],
)
def test_part_that_has_no_place_is_refused(name: str, shape: int, found: str) -> None:
    parts = {"a": {name: Dense(torch.ones(shape))}}
    with pytest.raises(
        ArtifactError, match=rf"an expert's part '{name}' of shape \(4,\) has no place: there is {found}"
    ):
        TwinModel(tiny.bert(), parts)


# ---- loading


def test_loading_says_nothing_and_leaves_the_users_settings_alone(
    family: Get, twin: Twins, capfd: pytest.CaptureFixture[str]
) -> None:
    logging = transformers.utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    capfd.readouterr()
    try:
        TwinModel.from_pretrained(twin("bert"))
        load_backbone(family("bert").root / "sms")
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        logging.disable_progress_bar()
        TwinModel.from_pretrained(twin("bert"))
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
        else:
            logging.disable_progress_bar()


def test_model_folder_that_lacks_a_parameter_is_refused(family: Get, tmp_path: Path) -> None:
    family("bert")
    tiny.bert().save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda t: {k: v for k, v in t.items() if "pooler" not in k})
    assert load_backbone(tmp_path).pooler is None  # which a base may do without
    rewrite(tmp_path / "model.safetensors", lambda t: {k: v for k, v in t.items() if "1.output.dense" not in k})
    with pytest.raises(ArtifactError, match=r"lacks 2 parameters of BertModel, first 'encoder\.layer\.1\.output"):
        load_backbone(tmp_path)


def test_weights_that_a_class_does_not_take_are_refused(twin: Twins) -> None:
    state = TwinModel.from_pretrained(twin("bert")).twin.state_for(random_gate(1)[0])
    with pytest.raises(ArtifactError, match="BertModel does not take the twin's weights: 'odd'"):
        backbone_from(Checkpoint.open(twin("bert")), {**state, "odd": torch.ones(2)})
    backbone_from(
        Checkpoint.open(twin("bert")), {**state, "embeddings.position_ids": torch.arange(32)[None]}
    )  # of an older file
    del state["pooler.dense.bias"]
    with pytest.raises(ArtifactError, match=r"BertModel does not take the twin's weights: 'pooler\.dense\.bias'"):
        backbone_from(Checkpoint.open(twin("bert")), state)


def head_of(family: Family, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    checkpoint = Checkpoint.open(family.root / name)
    return dict(checkpoint.config), {k: checkpoint.read(k) for k in checkpoint.specs if k.startswith("classifier")}


def test_head_that_is_not_of_its_class_is_refused(family: Get) -> None:
    config, tensors = head_of(family("bert"), "sms")
    with pytest.raises(MismatchError, match=r"BertForSequenceClassification must hold .* \(differs in 'odd'\)"):
        load_head(config, {**tensors, "odd": torch.ones(1)})
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
    message = r"the head of BertForSequenceClassification does not fit its config: size mismatch for classifier\."
    with pytest.raises(MismatchError, match=message) as caught:
        load_head(config, wide)
    assert "\n" not in str(caught.value)


def test_class_unknown_to_transformers_is_refused() -> None:
    config = transformers.BertConfig(architectures=["BertForNothing"])
    with pytest.raises(
        MismatchError, match=r"x: config\.json must name a transformers class .*, found \['BertForNothing'\]"
    ):
        model_class(config, "x")


def test_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert found.pad_token == "[SEP]"
    assert found(["w5 w6", "w7"], padding=True)["attention_mask"] == [[1, 1], [1, 0]]


def test_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
