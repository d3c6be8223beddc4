"""TwinModel on real classes of transformers: the laws of the method, seen from outside."""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tests.tiny import EXPERTS, GATE_ORDER, LABELS, Family, random_gate
from twinmerge.errors import MismatchError
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.hf.heads import TwinOutput, load_head
from twinmerge.hf.loading import backbone_from, load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.twin.artifact import TwinArtifact
from twinmerge.twin.features import Features, Layers

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


Get = Callable[[str], Family]
Twins = Callable[..., Path]
FAMILIES = sorted(tiny.BASES)
WITH_HEADS = ["bert", "distilbert", "roberta"]
ROWS = [row["text"] for name in EXPERTS for row in tiny.text_rows(name, 3)]
FORMS: Mapping[str, dict[str, Any]] = {
    "whole": {"rank": 64, "embeddings": "exclusive"},
    "rank 2": {"rank": 2, "embeddings": "exclusive"},
    "magnitude": {"compression": "magnitude", "density": 0.3, "embeddings": "exclusive"},
    "random": {"compression": "random", "density": 0.3},
}


def batch(*texts: str, side: str = "right") -> dict[str, Tensor]:
    return dict(tiny.tokenizer(side)(list(texts), return_tensors="pt", padding=True))


def stacked(logits: Any) -> Tensor:
    """One tensor of answers; rows of heads with fewer labels are filled up."""
    if isinstance(logits, Tensor):
        return logits
    width = max(len(row) for row in logits)
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in logits])


def expert_model(family: Family, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    cls = getattr(transformers, tiny.BASES[family.root.name][1])
    model: PreTrainedModel = cls.from_pretrained(family.root / name, dtype=dtype).eval()
    return model


# ---- full rank


@pytest.mark.parametrize("name", FAMILIES)
def test_gate_of_one_expert_gives_that_expert(family: Get, twin: Twins, name: str) -> None:
    model, x = TwinModel.from_pretrained(twin(name)), batch(*ROWS)
    for expert in EXPERTS:
        with torch.no_grad():
            expected = expert_model(family(name), expert)(**x).logits
        gate = torch.tensor([[float(e == expert) for e in GATE_ORDER]]).repeat(len(ROWS), 1)
        for out in (model(**x, expert=expert), model(**x, gate=gate)):
            # factors are stored in float32: every weight is right to about 1e-7
            assert torch.allclose(stacked(out.logits), expected, atol=1e-5)
            assert out.expert == [expert] * len(ROWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_gate_gives_the_gated_mean_of_the_experts(family: Get, twin: Twins, name: str) -> None:
    found = family(name)
    model, x = TwinModel.from_pretrained(twin(name), dtype=torch.float64), batch(*ROWS[:3])
    gate = random_gate(1, dtype=torch.float64)[0]
    experts = [expert_model(found, e, torch.float64) for e in GATE_ORDER]
    states = [expert.base_model.state_dict() for expert in experts]
    body = experts[0].base_model
    body.load_state_dict({k: sum(w * s[k] for w, s in zip(gate, states, strict=True)) for k in states[0]})
    with torch.no_grad():
        expected = body(**x)[0]
    out = model.encode(gate.repeat(3, 1), **x)[0]
    assert torch.allclose(out, expected, atol=1e-5)  # factors are stored in float32


# ---- the shared expert


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["whole", "random"])
def test_gate_of_zeros_is_the_shared_expert_that_plain_transformers_loads(twin: Twins, name: str, form: str) -> None:
    folder = twin(name, exclusive=FORMS[form])
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    model, x = TwinModel.from_pretrained(folder), batch(*ROWS)
    with torch.no_grad():
        expected = plain(**x)[0]
    assert torch.equal(model.encode(None, **x)[0], expected)
    # the same sums in another order
    assert torch.allclose(model.encode(torch.zeros(len(ROWS), 3), **x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_rank_zero_without_vectors_is_the_shared_expert(family: Get, twin: Twins, name: str) -> None:
    folder = twin(name)
    x = batch(*ROWS)
    model = TwinModel(load_backbone(folder), {e: {} for e in GATE_ORDER})
    with torch.no_grad():
        expected = load_backbone(folder).base_model(**x)[0]
    assert torch.equal(model.encode(random_gate(len(ROWS)), **x)[0], expected)


# ---- factored = materialised


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_batch_is_every_row_with_its_own_model(twin: Twins, name: str, form: str) -> None:
    model = TwinModel.from_pretrained(twin(name, exclusive=FORMS[form]), dtype=torch.float64)
    x, gate = batch(*ROWS[:4]), random_gate(4, dtype=torch.float64)
    found = stacked(model(**x, gate=gate).logits)
    for row, weights in enumerate(gate):
        with torch.no_grad():
            expected = model.materialize(weights)(**{key: value[row : row + 1] for key, value in x.items()}).logits
        assert torch.allclose(found[row, ..., : expected.shape[-1]], expected[0], atol=1e-10)  # float64


@pytest.mark.parametrize("name", FAMILIES)
def test_materialised_model_is_a_plain_one_of_its_own(family: Get, twin: Twins, tmp_path: Path, name: str) -> None:
    model = TwinModel.from_pretrained(twin(name))
    plain = model.materialize(torch.tensor([0.1, 0.7, 0.2]))
    expert = expert_model(family(name), "sms")
    assert type(plain) is type(expert)
    assert plain.state_dict().keys() == expert.state_dict().keys()
    x = batch(*ROWS)
    with torch.no_grad():
        before = plain(**x).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(plain(**x).logits, before)  # shares no memory with the twin
        plain.save_pretrained(tmp_path / "plain")
        again = type(plain).from_pretrained(tmp_path / "plain").eval()
        assert torch.equal(again(**x).logits, before)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_state_for_a_gate_serves_a_backbone(twin: Twins, name: str) -> None:
    folder = twin(name)
    model, x, gate = TwinModel.from_pretrained(folder), batch(*ROWS), random_gate(1)[0]
    plain = backbone_from(Checkpoint.open(folder), model.twin.state_for(gate))
    with torch.no_grad():
        found = plain.base_model(**x)[0]
    assert torch.allclose(found, model.encode(gate.repeat(len(ROWS), 1), **x)[0], atol=1e-5)


# ---- rows on their own


@pytest.mark.parametrize("name", FAMILIES)
def test_row_does_not_depend_on_its_batch_mates_or_on_padding(twin: Twins, name: str) -> None:
    side = "right"
    model = TwinModel.from_pretrained(twin(name), dtype=torch.float64)
    texts = sorted(ROWS, key=len)
    gate = random_gate(len(texts), dtype=torch.float64)
    x = batch(*texts, side=side)
    together = model(**x, gate=gate)
    for row in (0, len(texts) // 2, len(texts) - 1):
        alone = model(**batch(texts[row]), gate=gate[row : row + 1])
        found, expected = stacked(together.logits)[row], stacked(alone.logits)[0]
        if not model.heads:  # logits of every token; the real ones come first
            found = found[: len(expected)]
        assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_permuting_experts_permutes_the_gate_and_changes_nothing_else(twin: Twins, name: str) -> None:
    folder = twin(name, exclusive=FORMS["rank 2"])
    artifact, x, gate = TwinArtifact.open(folder), batch(*ROWS), random_gate(len(ROWS), dtype=torch.float64)
    outputs = []
    for order in ([0, 1, 2], [2, 0, 1]):
        names = [GATE_ORDER[index] for index in order]
        heads = {n: load_head(*head).double() for n in names if (head := artifact.head(n))}
        parts = {n: {k: part.to(torch.float64) for k, part in artifact.exclusive(n).items()} for n in names}
        backbone = load_backbone(folder, dtype=torch.float64)
        model = TwinModel(backbone, parts, heads=heads)
        assert model.expert_names == tuple(names)
        outputs.append(model(**x, gate=gate[:, order]))
    assert outputs[0].expert == outputs[1].expert
    assert torch.allclose(stacked(outputs[0].logits), stacked(outputs[1].logits), atol=1e-10)


def test_two_threads_with_two_gates_do_not_mix(twin: Twins) -> None:
    model, x = TwinModel.from_pretrained(twin("bert")), batch(*ROWS)
    gates = [random_gate(len(ROWS), seed=seed) for seed in (0, 1)] + [None]
    expected = [model.encode(gate, **x)[0] for gate in gates]
    wrong: list[int] = []
    barrier = threading.Barrier(len(gates))

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(15):
            if not torch.equal(model.encode(gates[index], **x)[0], expected[index]):
                wrong.append(index)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(gates))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


# ---- what comes out


@pytest.mark.parametrize("name", WITH_HEADS)
def test_each_row_is_answered_by_the_head_of_its_expert(family: Get, twin: Twins, name: str) -> None:
    model, x = TwinModel.from_pretrained(twin(name)), batch(*ROWS)
    out = model(**x)
    assert isinstance(out, TwinOutput)
    assert out.gate.shape == (len(ROWS), 3)
    assert [len(row) for row in out.logits] == [LABELS[expert] for expert in out.expert]
    assert out.fallback.shape == (len(ROWS),)
    assert out.last_hidden_state.shape[:2] == x["input_ids"].shape
    assert torch.allclose(out.gate, model.route(**x))
    assert len(set(out.expert)) > 1


def test_caller_may_take_one_experts_head_under_another_gate(twin: Twins) -> None:
    model, x = TwinModel.from_pretrained(twin("bert")), batch(*ROWS[:3])
    gate = random_gate(3)
    out = model(**x, gate=gate, expert=["trec", "ag", "ag"])
    assert [len(row) for row in out.logits] == [2, 4, 4]
    assert torch.equal(out.gate, gate)
    assert out.fallback is None
    hidden = model.encode(gate, **x)
    for row, (logits, expert) in enumerate(zip(out.logits, out.expert, strict=True)):
        assert torch.allclose(model.heads[expert].classifier(hidden.pooler_output[row]), logits, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_with_one_output_layer_give_one_tensor(twin: Twins, name: str) -> None:
    model, x = TwinModel.from_pretrained(twin(name)), batch(*ROWS)
    out = model(**x)
    assert out.logits.shape == (*x["input_ids"].shape, tiny.VOCABULARY)
    assert out.last_hidden_state is None
    assert set(out.expert) <= set(EXPERTS)


def test_plain_encoder_gives_hidden_states_only(tmp_path: Path) -> None:
    base = tiny.bert()
    model = TwinModel(base, {"a": {}, "b": {}})
    out = model(**batch(*ROWS), gate=random_gate(len(ROWS), 2))
    assert out.logits is None
    assert out.last_hidden_state.shape[2] == 16


def test_inputs_of_no_expert_are_left_to_the_shared_one(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    model.router.fallback_distance.fill_(-float("inf"))
    x = batch(*ROWS)
    out = model(**x)
    assert out.fallback.all()
    assert torch.equal(out.gate, torch.zeros(len(ROWS), 3))
    assert torch.allclose(out.last_hidden_state, model.encode(None, **x)[0], atol=1e-6)
    assert [len(row) for row in out.logits] == [LABELS[expert] for expert in out.expert]


# ---- features


def layers_of(words: str) -> Layers:
    layers = Features.parse(words).layers
    assert layers is not None
    return layers


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_means_over_the_real_tokens_of_the_shared_expert(twin: Twins, name: str) -> None:
    folder = twin(name)
    model, x = TwinModel.from_pretrained(folder), batch(*ROWS)
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = plain(**x, output_hidden_states=True)
    lengths = x["attention_mask"].sum(dim=1)
    means = [
        torch.stack([rows[: int(n)].mean(dim=0) for rows, n in zip(states, lengths, strict=True)])
        for states in (*out.hidden_states, out.last_hidden_state)
    ]
    for spec, expected in {
        "last": means[-1:],
        "all": means[:-1],
        "embeddings": means[:1],
        "layer:1": means[1:2],
        "layers:[2, 0]": [means[2], means[0]],
    }.items():
        assert torch.allclose(model.features_as(layers_of(spec), **x), torch.cat(expected, dim=1), atol=1e-5)
    assert torch.allclose(model.features(**x), model.features_as(layers_of("all"), **x))


def test_features_without_a_mask_take_every_token(twin: Twins) -> None:
    model, x = TwinModel.from_pretrained(twin("bert")), batch(ROWS[0])
    assert torch.allclose(
        model.features_as(layers_of("last"), input_ids=x["input_ids"]),
        model.features_as(layers_of("last"), **x),
        atol=1e-6,
    )


def test_layer_beyond_the_last_is_named(twin: Twins) -> None:
    with pytest.raises(MismatchError, match=r"^router\.features: layer 7 must be at most 2, the model's last$"):
        TwinModel.from_pretrained(twin("bert")).features_as(layers_of("layers:[0,7]"), **batch("w5"))


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_answers_as_float32_to_its_precision(twin: Twins, name: str, dtype: torch.dtype) -> None:
    x, gate = batch(*ROWS), random_gate(len(ROWS))
    wide = TwinModel.from_pretrained(twin(name))
    model = TwinModel.from_pretrained(twin(name), dtype=dtype)
    assert {p.dtype for p in model.backbone.parameters()} == {dtype}
    found, expected = stacked(model(**x, gate=gate).logits), stacked(wide(**x, gate=gate).logits)
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 10 * torch.finfo(dtype).eps
    assert model.route(**x).dtype == torch.float32


def test_buffers_keep_the_precision_they_need(twin: Twins) -> None:
    """The rotary frequencies of Llama are float32 whatever the weights are."""
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.bfloat16)
    plain = model.materialize(torch.tensor([0.2, 0.3, 0.5]))
    for found in (model.backbone, plain):
        assert found.model.rotary_emb.inv_freq.dtype == torch.float32
        assert found.lm_head.weight.dtype == torch.bfloat16


def test_model_can_be_moved(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("bert"), device="meta")
    assert model.device.type == "meta"
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
