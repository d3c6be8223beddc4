"""A twin in the places where tools expect a transformers model: calls, losses, caches, pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.tiny import GATE_ORDER, random_gate
from twinmerge.errors import GateError
from twinmerge.hf.model import TwinModel

Twins = Callable[..., Path]
IDS = torch.tensor([[6, 7, 8, 9, 10, 11], [30, 31, 32, 33, 34, 35], [50, 51, 52, 53, 54, 55]])


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, twin: Twins) -> TwinModel:
    return TwinModel.from_pretrained(twin(request.param), dtype=torch.float64)


def test_it_says_what_a_model_says_of_itself(model: TwinModel) -> None:
    assert model.config is model.backbone.config
    assert model.generation_config is model.backbone.generation_config
    assert model.can_generate()
    assert model.dtype == torch.float64
    assert model.main_input_name == "input_ids"
    assert model.get_input_embeddings().weight.shape[0] == tiny.VOCABULARY
    assert model.get_output_embeddings() is not None


def test_inputs_may_come_by_position(model: TwinModel) -> None:
    gate = random_gate(3, dtype=torch.float64)
    by_name = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), gate=gate).logits
    assert torch.equal(model(IDS, torch.ones_like(IDS), gate=gate).logits, by_name)
    written = model.generate(IDS, gate=gate, max_new_tokens=3, do_sample=False, pad_token_id=0)
    same = model.generate(input_ids=IDS, gate=gate, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(written, same)


def test_loss_of_texts_is_that_of_each_rows_merged_model(model: TwinModel) -> None:
    gate, labels = random_gate(3, dtype=torch.float64), IDS.clone()
    labels[:, :3] = -100
    out = model(IDS, gate=gate, labels=labels)
    alone = [model.materialize(gate[i])(IDS[i : i + 1], labels=labels[i : i + 1]).loss for i in range(3)]
    assert torch.allclose(out.loss, torch.stack(alone).mean())
    assert out[0] is out.loss


def test_router_sees_no_token_of_which_a_loss_is_asked(model: TwinModel) -> None:
    """The same prompt with other answers has the same gate, even where answers are another expert's words."""
    labels = IDS.clone()
    labels[:, :1] = -100
    gates = []
    for answers in (IDS, IDS.roll(1, dims=0), IDS.roll(2, dims=0)):
        whole = torch.cat([IDS[:, :1], answers[:, 1:]], dim=1)
        gates.append(model(whole, labels=torch.where(labels == -100, -100, whole)).gate)
    assert torch.equal(gates[0], gates[1])
    assert torch.equal(gates[0], gates[2])
    assert torch.allclose(gates[0], model.route(input_ids=IDS[:, :1]), atol=1e-6)
    whole = torch.cat([IDS[:, :1], IDS.roll(1, dims=0)[:, 1:]], dim=1)
    assert not torch.allclose(gates[0], model(whole).gate)  # it would matter


def test_cache_goes_on_under_the_gate_of_its_prompt(model: TwinModel) -> None:
    gate = random_gate(3, dtype=torch.float64)
    first = model(IDS[:, :4], gate=gate, use_cache=True)
    rest = model(IDS[:, 4:], gate=gate, past_key_values=first.past_key_values)
    assert torch.allclose(rest.logits, model(IDS, gate=gate).logits[:, 4:])
    with pytest.raises(GateError, match="needs the gate of its prompts"):
        model(IDS[:, 4:], past_key_values=first.past_key_values)


def test_loss_of_classifiers_is_each_heads_own(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"), dtype=torch.float64)
    out = model(IDS, torch.ones_like(IDS), expert=list(GATE_ORDER), labels=[1, 2, 0])
    alone = []
    for index, name in enumerate(GATE_ORDER):
        plain = model.materialize(model.one_hot([name])[0].double())
        alone.append(plain(input_ids=IDS[index : index + 1], labels=torch.tensor([[1, 2, 0][index]])).loss)
    assert torch.allclose(out.loss, torch.stack(alone).mean())


def test_pipeline_of_transformers_writes_each_prompt_by_its_experts_model(twin: Twins) -> None:
    model: Any = TwinModel.from_pretrained(twin("llama"))
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    prompts = ["w6 w7 w8 w9", "w30 w31", "w50 w51 w52"]
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    for prompt, (answer,) in zip(prompts, pipeline(prompts, **settings), strict=True):
        inputs = model.tokenizer([prompt], return_tensors="pt")
        gate = model.route(**inputs)
        ids = model.materialize(gate[0]).generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        said = model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["generated_text"].strip() == said.strip()


def test_streamer_gets_the_tokens_one_by_one(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"))

    class Kept(transformers.generation.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    kept = Kept()
    written = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, streamer=kept)
    assert kept.tokens == written[0].tolist()
    assert kept.calls == 1 + written.shape[1] - IDS.shape[1]


def test_generation_config_of_the_caller_leaves_experts_their_own(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    gate = random_gate(3, dtype=torch.float64)
    given = transformers.GenerationConfig(**{**model.backbone.generation_config.to_dict(), "max_new_tokens": 3})
    written = model.generate(IDS, gate=gate, generation_config=given, do_sample=False, pad_token_id=0)
    same = model.generate(IDS, gate=gate, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(written, same)
