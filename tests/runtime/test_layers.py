"""Gated layers: the same numbers as a layer with its weights rebuilt for every row, with nothing rebuilt."""

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from tests import reference
from twinmerge.errors import GateError
from twinmerge.runtime.compose import theta
from twinmerge.runtime.gate import GateContext, GateSlot
from twinmerge.runtime.layers import (
    GatedLayer,
    form_of,
)
from twinmerge.runtime.paths import Path
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense, Part
from twinmerge.tensors.sparse import keep_largest

EXPERTS = 3
DOUBLE = torch.float64
Parts = list[dict[str, Part]]

LAYER: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "linear on vectors": (lambda: nn.Linear(6, 5), (6,)),
    "linear on four axes": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "conv1d": (lambda: Conv1D(5, 6), (3, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), (3,)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "rms norm": (lambda: LlamaRMSNorm(6), (3, 6)),
    "gemma's norm": (lambda: GemmaRMSNorm(6), (3, 6)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 7, 7)),
    "convolution that keeps the size": (lambda: nn.Conv2d(2, 4, 3, padding="same"), (2, 5, 5)),
    "dilated convolution": (lambda: nn.Conv2d(2, 4, 3, dilation=2, bias=False), (2, 7, 7)),
    "convolution in time": (lambda: nn.Conv1d(2, 4, 3, padding=1), (2, 9)),
    "depthwise convolution that keeps the size": (lambda: nn.Conv2d(4, 4, 5, padding="same", groups=4), (4, 5, 5)),
    "depthwise convolution": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
    "grouped convolution without bias": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "grouped convolution in time": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
}
ALL = sorted(LAYER)


def run(layer: GatedLayer, x: Tensor, gate: Tensor | None, path: Path | None = None) -> Tensor:
    with torch.no_grad(), layer.slot.use(None if gate is None else GateContext(gate, path=path)):
        found: Tensor = layer(x)
    return found


def make(name: str, seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(seed)
    module = LAYER[name][0]().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def parts_for(module: nn.Module, form: str = "mixed", seed: int = 0) -> Parts:
    """Part parts of three experts: ranks 2, 1 and 0, or sparse; vectors of the first and the last."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(module.parameters()).dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)

    parts: Parts = [{} for _ in range(EXPERTS)]
    for name, parameter in module.named_parameters():
        for index in range(EXPERTS):
            if parameter.ndim == 1:
                if index != 1:
                    parts[index][name] = Dense(random(len(parameter)))
                continue
            out, columns = parameter.shape[0], parameter[0].numel()
            if form == "sparse" or (form == "mixed" and index == 1):
                parts[index][name] = keep_largest(random(out, columns), 0.4)
            else:
                rank = 2 - index
                parts[index][name] = LowRank(random(out, rank), random(rank, columns))
    return parts


def gated(module: nn.Module, parts: Parts, slot: GateSlot | None = None) -> GatedLayer:
    by_parameter: dict[str, dict[int, Part]] = {}
    for index, of_expert in enumerate(parts):
        for name, part in of_expert.items():
            by_parameter.setdefault(name, {})[index] = part
    form = form_of(module)
    assert form is not None
    return form(module, by_parameter, EXPERTS, slot or GateSlot())


def inputs(name: str, rows: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (rows, *LAYER[name][1])
    if name == "embedding":
        return torch.randint(0, 9, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)


def rebuilt(module: nn.Module, parts: Parts, x: Tensor, gate: Tensor) -> Tensor:
    """Row by row, the plain layer with the weights of that row's gate."""
    with torch.no_grad():
        rows = [
            functional_call(module, theta(dict(module.named_parameters()), parts, weights), (row[None],))
            for row, weights in zip(x, gate, strict=True)
        ]
    return torch.cat(rows)


def gates(rows: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.rand(rows, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).softmax(1).to(dtype)


# ---- the law: factored = materialised


@pytest.mark.parametrize(
    ("form", "path"), [("mixed", None), ("sparse", None), ("factors", "all"), ("factors", "gather")]
)
@pytest.mark.parametrize("name", ALL)
def test_mixed_batch_is_every_row_with_its_own_weights(name: str, form: str, path: Path | None) -> None:
    module = make(name)
    parts = parts_for(module, form)
    x, gate = inputs(name, 4), gates(4)
    expected = rebuilt(module, parts, x, gate)
    assert torch.allclose(run(gated(module, parts), x, gate, path), expected, atol=1e-10)  # float64


@given(
    name=st.sampled_from(ALL),
    seed=st.integers(0, 999),
    gate=st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=4),
)
@settings(max_examples=40)
def test_any_gate_gives_every_row_its_own_weights(name: str, seed: int, gate: list[list[float]]) -> None:
    module = make(name, seed)
    parts = parts_for(module, "mixed", seed)
    x, weights = inputs(name, len(gate), seed), torch.tensor(gate, dtype=DOUBLE)
    assert torch.allclose(run(gated(module, parts), x, weights), rebuilt(module, parts, x, weights), atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_materialised_parameters_are_the_dense_reference(name: str) -> None:
    module = make(name)
    parts = parts_for(module)
    gate = gates(1)[0]
    expected = theta(dict(module.named_parameters()), parts, gate)
    for leaf, value in gated(module, parts).materialized(gate).items():
        assert torch.allclose(value, expected[leaf], atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ALL)
def test_other_dtypes_give_the_same_to_their_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    module = make(name, dtype=dtype)
    parts = parts_for(module, "factors")
    x, gate = inputs(name, 3, dtype=dtype), gates(3, dtype=torch.float32)
    found = run(gated(module, parts), x, gate)
    expected = rebuilt(
        module.double(),
        [{k: p.to(DOUBLE) for k, p in e.items()} for e in parts],
        x.to(DOUBLE) if x.is_floating_point() else x,
        gate.double(),
    )
    assert found.dtype == dtype
    scale = float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) < tolerance * scale


# ---- limit cases


@pytest.mark.parametrize("name", ALL)
def test_no_gate_is_the_shared_layer_to_the_bit(name: str) -> None:
    module = make(name)
    x = inputs(name, 3)
    assert torch.equal(run(gated(module, parts_for(module)), x, None), module(x))


@pytest.mark.parametrize("name", ALL)
def test_gate_of_zeros_is_the_shared_layer(name: str) -> None:
    module = make(name)
    x = inputs(name, 3)
    found = run(gated(module, parts_for(module)), x, torch.zeros(3, EXPERTS, dtype=DOUBLE))
    assert torch.allclose(found, module(x), atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_rank_zero_is_the_shared_layer(name: str) -> None:
    module = make(name)
    matrices = {n: p for n, p in module.named_parameters() if p.ndim > 1}
    parts: Parts = [{n: LowRank(p.new_zeros(len(p), 0), p.new_zeros(0, p[0].numel())) for n, p in matrices.items()}] * 3
    x = inputs(name, 3)
    assert torch.allclose(run(gated(module, parts), x, gates(3)), module(x), atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_expert_with_one_kind_of_part_only(name: str) -> None:
    module = make(name)
    everything = parts_for(module, "factors")
    for leaf, _ in module.named_parameters():
        parts: Parts = [{}, {}, {leaf: everything[0][leaf]}]
        x, gate = inputs(name, 3), gates(3)
        assert torch.allclose(run(gated(module, parts), x, gate), rebuilt(module, parts, x, gate), atol=1e-10)


# ---- other laws


@pytest.mark.parametrize("name", ALL)
def test_row_does_not_depend_on_its_batch_mates(name: str) -> None:
    module = make(name)
    layer = gated(module, parts_for(module))
    x, gate = inputs(name, 5), gates(5)
    together = run(layer, x, gate)
    for row in range(5):
        assert torch.allclose(run(layer, x[row : row + 1], gate[row : row + 1]), together[row : row + 1], atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_permuting_experts_with_their_gates_changes_nothing(name: str) -> None:
    module = make(name)
    parts = parts_for(module)
    x, gate, order = inputs(name, 4), gates(4), [2, 0, 1]
    permuted = gated(module, [parts[index] for index in order])
    assert torch.allclose(run(permuted, x, gate[:, order]), run(gated(module, parts), x, gate), atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_gate_of_a_row_serves_its_beams(name: str) -> None:
    module = make(name)
    layer = gated(module, parts_for(module))
    x, gate = inputs(name, 6), gates(3)
    assert torch.allclose(run(layer, x, gate), run(layer, x, gate.repeat_interleave(2, dim=0)), atol=1e-12)


@pytest.mark.parametrize("path", ["all", "gather"])
@pytest.mark.parametrize("name", ["linear on vectors", "conv1d", "embedding", "layer norm", "rms norm", "gemma's norm"])
def test_each_packed_token_may_have_a_gate_of_its_own(name: str, path: Path) -> None:
    """What continuous batching hands over: (token, features), and ids (token,), of rows of any length."""
    module = make(name)
    parts = parts_for(module, "factors")
    packed = inputs(name, 4)
    packed = packed.flatten() if name == "embedding" else packed.reshape(-1, packed.shape[-1])
    gate = gates(len(packed))
    expected = rebuilt(module, parts, packed, gate)
    assert torch.allclose(run(gated(module, parts), packed, gate, path), expected, atol=1e-10)


def test_packed_tokens_take_the_gate_of_their_input() -> None:
    module = make("linear")
    layer = gated(module, parts_for(module))
    x, gate = inputs("linear", 4), gates(4)
    packed = run(layer, x.reshape(12, 6), gate)
    assert torch.allclose(packed.view(4, 3, 5), run(layer, x, gate), atol=1e-12)


def test_positions_shared_by_the_batch_get_a_row_for_every_gate() -> None:
    module = make("embedding")
    parts = parts_for(module)
    ids, gate = torch.arange(4)[None], gates(3)
    found = run(gated(module, parts), ids, gate)
    assert found.shape == (3, 4, 4)
    assert torch.allclose(found, rebuilt(module, parts, ids.expand(3, 4), gate), atol=1e-10)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_rows_that_are_no_multiple_of_the_gates_are_refused(leaf: str) -> None:
    """Not even where the tokens of all rows together are one."""
    module = make("linear")
    parts: Parts = [{leaf: part[leaf]} if leaf in part else {} for part in parts_for(module, "factors")]
    with pytest.raises(GateError, match="a gate of 3 rows cannot serve a layer's 4 rows; it must divide them"):
        run(gated(module, parts), inputs("linear", 4), gates(3))


def test_gate_of_a_call_inside_a_call_ends_with_it() -> None:
    slot = GateSlot()
    module = make("linear")
    layer = gated(module, parts_for(module), slot)
    x, outer, inner = inputs("linear", 2), gates(2), gates(2, seed=5)
    with torch.no_grad(), slot.use(GateContext(outer)):
        with slot.use(GateContext(inner)):
            assert torch.equal(layer(x), run(layer, x, inner))
        with pytest.raises(RuntimeError), slot.use(GateContext(inner)):
            layer(x[..., :2])
        assert torch.equal(layer(x), run(layer, x, outer))


def test_layer_hands_through_what_models_read_of_it() -> None:
    layer = gated(make("linear"), [{}, {}, {}])
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (6, 5, (5, 6))
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


# ---- fast against the formulas


def test_linear_is_the_formula_of_the_reference() -> None:
    module = make("linear")
    parts = parts_for(module, "factors")
    x, gate = inputs("linear", 4), gates(4)
    factors = [part["weight"] for part in parts]
    assert all(isinstance(part, LowRank) for part in factors)
    expected = reference.gated_linear(
        x,
        module.weight,
        module.bias,
        [part.up for part in factors],
        [part.down for part in factors],
        [part["bias"].values if "bias" in part else None for part in parts],
        gate,
    )
    assert torch.allclose(run(gated(module, parts), x, gate), expected, atol=1e-10)


def test_embedding_is_the_formula_of_the_reference() -> None:
    module = make("embedding")
    factors = [part["weight"] for part in parts_for(module, "factors")]
    ids, gate = inputs("embedding", 4), gates(4)
    expected = reference.gated_embedding(ids, module.weight, [f.up for f in factors], [f.down for f in factors], gate)
    assert torch.allclose(run(gated(module, [{"weight": f} for f in factors]), ids, gate), expected, atol=1e-10)


def test_layer_norm_is_the_formula_of_the_reference() -> None:
    module = make("layer norm")
    parts = parts_for(module)
    x, gate = inputs("layer norm", 4), gates(4)
    zero = Dense(torch.zeros(6, dtype=DOUBLE))
    weights, biases = ([part.get(leaf, zero).values for part in parts] for leaf in ("weight", "bias"))
    expected = reference.gated_layer_norm(x, module.weight, module.bias, weights, biases, gate, 1e-5)
    assert torch.allclose(run(gated(module, parts), x, gate), expected, atol=1e-10)
