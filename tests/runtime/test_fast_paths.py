"""A whole model on every path against the dense reference: mixed gates, merged weights, generation, one pass."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from twinmerge.hf.model import Mode, TwinModel
from twinmerge.runtime.compose import theta
from twinmerge.runtime.merged import MergeCache
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense
from twinmerge.twin.features import Layers

EXPERTS = 3
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}  # float32, two layers of sums in another order


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    return BertModel(config, add_pooling_layer=False).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def exclusive_of(model: torch.nn.Module) -> dict[str, dict[str, object]]:
    torch.manual_seed(1)
    parts: dict[str, dict[str, object]] = {}
    for expert in range(EXPERTS):
        parts[f"e{expert}"] = {
            name: Dense(0.1 * torch.randn(value.shape))
            if value.ndim == 1
            else LowRank(0.3 * torch.randn(value.shape[0], 1 + expert), 0.3 * torch.randn(1 + expert, value.shape[1]))
            for name, value in model.named_parameters()
            if "position" not in name and "lm_head" not in name
        }
    return parts


def twin(make: object, **settings: object) -> tuple[TwinModel, object]:
    backbone = make()
    exclusive = exclusive_of(backbone)
    shared = {name: value.detach().clone() for name, value in backbone.named_parameters()}

    def dense(gate: Tensor) -> torch.nn.Module:
        model = make()
        model.load_state_dict(theta(shared, list(exclusive.values()), gate), strict=False)
        return model

    return TwinModel(backbone, exclusive, **settings), dense


GATES = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]),
}


@pytest.mark.parametrize("mode", ["auto", "all", "gather", "merge"])
def test_each_mode_is_the_dense_reference(mode: Mode) -> None:
    model, dense = twin(bert)
    found = model.encode(GATES, mode=mode, **INPUTS)[0]
    for row, gate in enumerate(GATES):
        with torch.inference_mode():
            want = dense(gate)(**{k: v[row : row + 1] for k, v in INPUTS.items()})[0][0]
        real = int(INPUTS["attention_mask"][row].sum())
        torch.testing.assert_close(found[row, :real], want[:real], **TOLERANCE)


@pytest.mark.parametrize("mode", ["auto", "all", "gather", "merge"])
def test_generation_under_mixed_gates_is_that_of_each_row_alone(mode: Mode) -> None:
    model, dense = twin(llama)
    prompts = {
        "input_ids": torch.tensor([[0, 6, 7, 8], [9, 10, 11, 12], [0, 0, 15, 16], [17, 18, 19, 20]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    for beams in (1, 2):
        found = model.generate(gate=GATES, mode=mode, **prompts, max_new_tokens=6, min_new_tokens=6, num_beams=beams)
        for row, gate in enumerate(GATES):
            alone = {k: v[row : row + 1] for k, v in prompts.items()}
            want = dense(gate).generate(**alone, max_new_tokens=6, min_new_tokens=6, num_beams=beams)
            assert found[row].tolist() == want[0].tolist()


@pytest.mark.parametrize("mode", ["all", "gather"])
def test_a_step_of_a_generation_in_bfloat16_is_the_dense_reference_to_its_precision(mode: Mode) -> None:
    model, dense = twin(llama)
    model.to(torch.bfloat16)
    prompt, step = torch.tensor([[5, 6, 7]] * 4), torch.tensor([[8]] * 4)
    with torch.inference_mode(), model.twin.slot.use(model.twin.context(GATES, 16, 2, mode)):
        cache = model.backbone(input_ids=prompt, use_cache=True).past_key_values
        found = model.backbone(input_ids=step, past_key_values=cache).logits[:, -1].float()
    for row, gate in enumerate(GATES):
        with torch.inference_mode():
            want = dense(gate)(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
        assert float((found[row] - want).norm() / want.norm()) < 10 * torch.finfo(torch.bfloat16).eps


def test_a_long_generation_under_one_gate_merges_the_weights_once() -> None:
    model, dense = twin(llama)
    one = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert model.merged.nbytes == 0
    found = model.generate(gate=GATES[:1], **one, max_new_tokens=8, min_new_tokens=8)
    assert model.merged.nbytes == model.merged.set_bytes
    want = dense(GATES[0]).generate(**one, max_new_tokens=8, min_new_tokens=8)
    assert found.tolist() == want.tolist()
    model.to(torch.float64)
    assert model.merged.nbytes == 0


def test_merged_weights_are_bounded_and_the_least_recently_used_go() -> None:
    model, _ = twin(bert)
    size = model.merged.set_bytes
    cache = MergeCache(model.merged.layers, 2 * size)

    def merged(row: int) -> object:
        found = cache.weights(tuple(GATES[row].tolist()), GATES[row])
        assert cache.nbytes <= 2 * size
        return found

    kept = [merged(row) for row in (0, 1, 0, 2)]
    assert merged(0) is kept[0]
    assert merged(1) is not kept[1]
    none = MergeCache(model.merged.layers, size - 1)
    none.weights((0.0,), GATES[2])
    assert none.nbytes == 0
    assert not none.pays(tokens=10**6)


def test_whether_weights_are_merged_depends_on_the_call_alone() -> None:
    """Merged and factored weights round differently: what was asked before must not choose between them."""
    model, _ = twin(bert)
    needed = int(model.merged.break_even_tokens)
    assert [model.merged.pays(tokens, calls=0) for tokens in (needed - 1, needed + 1)] == [False, True]
    assert model.merged.pays(0, calls=needed)
    one = {name: values[:1] for name, values in INPUTS.items()}
    first = model.encode(GATES[:1], **one)[0]
    for _ in range(8):
        model.encode(GATES[:1], mode="merge", **one)
    assert torch.equal(model.encode(GATES[:1], **one)[0], first)


def test_features_of_lower_layers_need_no_full_pass() -> None:
    model, _ = twin(bert)
    states = model.encode(None, **INPUTS, output_hidden_states=True)["hidden_states"]
    mask = INPUTS["attention_mask"].unsqueeze(-1)
    pooled = [(state * mask).sum(dim=1) / mask.sum(dim=1) for state in states]
    for layers in ((0,), (2,), (2, 0), (3,)):
        want = torch.cat([pooled[layer] for layer in layers], dim=1)
        torch.testing.assert_close(model.features_as(Layers(layers), **INPUTS), want, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["all", "gather", "merge"])
def test_each_mode_in_half_precision_is_the_dense_reference_to_its_precision(mode: Mode, dtype: torch.dtype) -> None:
    model, dense = twin(bert)
    model.to(dtype)
    found = model.encode(GATES, mode=mode, **INPUTS)[0]
    assert found.dtype == dtype
    for row, gate in enumerate(GATES):
        with torch.inference_mode():
            want = dense(gate)(**{k: v[row : row + 1] for k, v in INPUTS.items()})[0][0]
        real = int(INPUTS["attention_mask"][row].sum())
        # every weight and state is rounded, by eps / 2 each, and three layers add their own: 10 eps
        assert float((found[row, :real] - want[:real]).norm() / want[:real].norm()) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", ["all", "gather", "merge"])
def test_autocast_gives_the_same_states_to_its_precision(mode: Mode) -> None:
    model, _ = twin(bert)
    inputs = {"input_ids": torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(3))}
    gate = torch.tensor([[1.0, 0, 0], [0.2, 0.8, 0], [0, 0.5, 0.5], [0, 0, 0]])
    expected = model.encode(gate, mode=mode, **inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode(gate, mode=mode, **inputs)[0]
    # bfloat16 has 8 bits: a per cent of states of size 1, through three layers
    torch.testing.assert_close(found.float(), expected, atol=6e-2, rtol=6e-2)
    assert not torch.equal(found.float(), expected)
