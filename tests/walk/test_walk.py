"""A fixed sample of the walk over transformers' classes: each is served as its experts serve themselves."""

from pathlib import Path

import pytest

from tests.walk.laws import TOLERANCE, walk_class

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


SAMPLE = {
    "BertForSequenceClassification": ("classifier", "fast"),
    "LlamaForCausalLM": ("causal", "fast"),
    "GPT2LMHeadModel": ("causal", "fast"),
    "GPTNeoXForCausalLM": ("causal", "fast"),
    "FalconForCausalLM": ("causal", "fast"),
    "Gemma3ForCausalLM": ("causal", "fast"),
    "MambaForCausalLM": ("causal", "partly"),
    "DebertaV2ForSequenceClassification": ("classifier", "any"),
    "T5ForConditionalGeneration": ("seq2seq", "partly"),
    "BartForConditionalGeneration": ("seq2seq", "partly"),
    "ViTForImageClassification": ("image", "partly"),
    "ResNetForImageClassification": ("image", "fast"),
}
"""Class -> its kind, and how it is served where that is to stay so."""


@pytest.mark.filterwarnings("ignore")  # of classes' own code, about deprecated arguments and unused weights
@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_class_is_served_as_its_experts_serve_themselves(name: str, tmp_path: Path) -> None:
    kind, way = SAMPLE[name]
    found = walk_class(kind, name, tmp_path / "walk")
    assert found.way in (("fast", "partly") if way == "any" else (way,)), found
    assert max(found.expert, found.alone, found.merged) <= TOLERANCE
