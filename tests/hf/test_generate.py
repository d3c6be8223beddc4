"""Generation under gates fixed from the prompts: each row as its own materialised model would write it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from tests.tiny import GATE_ORDER, random_gate
from twinmerge.hf.model import TwinModel
from twinmerge.tensors.low_rank import LowRank

Twins = Callable[..., Path]
PROMPTS = ["w6 w7 w8 w9 w10", "w30 w31", "w50 w51 w52"]
NEW = 6


def prompts(*texts: str) -> dict[str, Tensor]:
    return dict(tiny.tokenizer("left")(list(texts), return_tensors="pt", padding=True))


def new_tokens(model: Any, x: dict[str, Tensor], **settings: Any) -> list[list[int]]:
    """What was written, without the prompt and what follows the end."""
    torch.manual_seed(0)
    written = model.generate(**x, max_new_tokens=NEW, pad_token_id=0, **settings)[:, x["input_ids"].shape[1] :]
    return [[token for token in row if token != 0] for row in written.tolist()]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, twin: Twins) -> TwinModel:
    return TwinModel.from_pretrained(twin(request.param), dtype=torch.float64)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_each_row_is_written_by_its_own_model(model: TwinModel, settings: dict[str, Any]) -> None:
    gate = random_gate(3, dtype=torch.float64)
    together = new_tokens(model, prompts(*PROMPTS), gate=gate, do_sample=False, **settings)
    alone = []
    for text, weights in zip(PROMPTS, gate, strict=True):
        alone += new_tokens(model.materialize(weights), prompts(text), do_sample=False, **settings)
    assert together == alone  # float64: no ties but exact ones
    assert len({tuple(row) for row in together}) > 1


def test_gates_decide_what_is_written(model: TwinModel) -> None:
    x = prompts(PROMPTS[0], PROMPTS[0], PROMPTS[0])
    logits = model(**x, gate=torch.eye(3).double()).logits[:, -1]
    assert len({tuple(row.tolist()) for row in logits}) == 3
    by_name = new_tokens(model, x, expert=list(GATE_ORDER), do_sample=False)
    assert by_name == new_tokens(model, x, gate=torch.eye(3).double(), do_sample=False)


def test_left_padding_changes_neither_the_route_nor_the_text(model: TwinModel) -> None:
    """GPT-2 counts positions: they start at the first real token, as in generate."""
    together = new_tokens(model, prompts(*PROMPTS), do_sample=False)
    assert together == [row for text in PROMPTS for row in new_tokens(model, prompts(text), do_sample=False)]


def test_sampling_draws_several_answers_under_each_gate(model: TwinModel) -> None:
    gate = random_gate(2, dtype=torch.float64)
    drawn = new_tokens(model, prompts(*PROMPTS[:2]), gate=gate, do_sample=True, num_return_sequences=4)
    assert len(drawn) == 8
    assert len({tuple(row) for row in drawn}) > 2


def test_prompt_without_a_mask_is_all_real(model: TwinModel) -> None:
    x = prompts(PROMPTS[0])
    assert new_tokens(model, {"input_ids": x["input_ids"]}, do_sample=False) == new_tokens(model, x, do_sample=False)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (transformers.GPT2LMHeadModel, tiny.gpt2().config),
        (transformers.Qwen2ForCausalLM, tiny.text_config(transformers.Qwen2Config, num_key_value_heads=1)),
        (
            transformers.OPTForCausalLM,
            tiny.text_config(transformers.OPTConfig, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=0),
        ),
        (transformers.GPTNeoXForCausalLM, tiny.text_config(transformers.GPTNeoXConfig)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_lora_on_layers_whose_bias_no_expert_changed_writes_each_row_as_its_own_model(cls: Any, config: Any) -> None:
    """Such a bias is one vector for all rows, and LoRA is most used so."""
    backbone = tiny.seeded(cls, config)
    generator = torch.Generator().manual_seed(1)
    matrices = {
        name: layer.weight.shape
        for name, layer in backbone.named_modules()
        if getattr(layer, "bias", None) is not None and layer.weight.ndim == 2
    }
    exclusive = {
        name: {
            f"{layer}.weight": LowRank(
                *(torch.randn(shape, generator=generator).double() for shape in ((out, 2), (2, n)))
            )
            for layer, (out, n) in matrices.items()
        }
        for name in ("a", "b", "c")
    }
    model = TwinModel(backbone.double(), exclusive)
    assert matrices
    for gate in (torch.eye(3).double(), random_gate(3, dtype=torch.float64)):
        together = new_tokens(model, prompts(*PROMPTS), gate=gate, do_sample=False)
        for text, weights, row in zip(PROMPTS, gate, together, strict=True):
            assert [row] == new_tokens(model.materialize(weights), prompts(text), do_sample=False)
