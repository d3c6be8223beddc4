"""Gated layers, fast against the slow formulas of reference.py: any gates, any ranks, both paths, shared inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.reference import gated_embedding, gated_layer_norm, gated_linear
from twinmerge.errors import GateError
from twinmerge.runtime.banks import join_banks, join_readers
from twinmerge.runtime.gate import GateContext, GateSlot, keep_large
from twinmerge.runtime.layers import (
    GatedConv,
    GatedConv1D,
    GatedEmbedding,
    GatedGroupedConv,
    GatedLayer,
    GatedLinear,
    GatedNorm,
)
from twinmerge.runtime.paths import Path, Ranks
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense
from twinmerge.tensors.sparse import keep_largest

EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64, sums of a few dozen terms in another order
BATCH, TOKENS, IN, OUT = 5, 3, 7, 6

paths = st.sampled_from([None, "all", "gather"])
gate_kinds = st.sampled_from(["soft", "one expert", "two experts", "zero", "negative", "same for all"])


def a_gate(kind: str, experts: int) -> Tensor:
    soft = torch.rand(BATCH, experts, dtype=torch.float64).softmax(dim=1)
    few = soft.topk(min(2 if kind == "two experts" else 1, experts), dim=1).indices
    return {
        "soft": soft,
        "one expert": torch.zeros_like(soft).scatter_(1, few, 1.0),
        "two experts": torch.zeros_like(soft).scatter_(1, few, 0.5),
        "zero": torch.zeros_like(soft),
        "negative": torch.randn_like(soft),
        "same for all": soft[:1].expand(BATCH, -1).contiguous(),
    }[kind]


def factors(rows: int, columns: int, rank: int) -> LowRank:
    return LowRank(torch.randn(rows, rank, dtype=torch.float64), torch.randn(rank, columns, dtype=torch.float64))


def linear_layer(ranks: list[int], slot: GateSlot, *, bias: bool, kind: type[GatedLinear] = GatedLinear) -> GatedLinear:
    shared = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64)
    parts = {"weight": {e: factors(OUT, IN, rank) for e, rank in enumerate(ranks)}}
    if bias:
        parts["bias"] = {e: Dense(torch.randn(OUT, dtype=torch.float64)) for e in range(len(ranks))}
    layer = GatedLinear(shared, parts, len(ranks), slot)
    layer.parts = parts
    return layer


def expected(layer: GatedLinear, x: Tensor, gate: Tensor) -> Tensor:
    parts = layer.parts
    biases = [parts["bias"][e].values if "bias" in parts else None for e in range(gate.shape[1])]
    pairs = [parts["weight"][e] for e in range(gate.shape[1])]
    return gated_linear(
        x, layer.shared.weight, layer.shared.bias, [p.up for p in pairs], [p.down for p in pairs], biases, gate
    )


@torch.no_grad()
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), gate_kinds, paths, st.booleans(), st.integers(0, 99))
def test_linear_layer_is_its_formula(ranks: list[int], kind: str, path: Path | None, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    slot, gate = GateSlot(), a_gate(kind, len(ranks))
    layer, x = linear_layer(ranks, slot, bias=bias), torch.randn(BATCH, TOKENS, IN, dtype=torch.float64)
    with slot.use(GateContext(gate, path=path)):
        torch.testing.assert_close(layer(x), expected(layer, x, gate), **EXACT)
    with slot.use(None):
        assert torch.equal(layer(x), layer.shared(x))


@torch.no_grad()
@given(gate_kinds, paths, st.integers(0, 99))
def test_layers_that_read_one_input_share_a_projection_and_keep_their_results(
    kind: str, path: Path | None, seed: int
) -> None:
    torch.manual_seed(seed)
    slot, gate = GateSlot(), a_gate(kind, 3)
    layers: list[GatedLayer] = [linear_layer(ranks, slot, bias=True) for ranks in ([2, 2, 2], [0, 3, 1], [1, 1, 2])]
    x, other = torch.randn(2, BATCH, TOKENS, IN, dtype=torch.float64)
    with slot.use(GateContext(gate, path=path)):
        before = [layer(x) for layer in layers]
    join_readers([layers])
    join_banks(layers)
    assert len({id(layer.projection) for layer in layers}) == 1
    with slot.use(GateContext(gate, path=path, keep=True)):
        for layer, found in zip(layers, before, strict=True):
            torch.testing.assert_close(layer(x), found, **EXACT)
            torch.testing.assert_close(layer(other), expected(layer, other, gate), **EXACT)
    row = gate[0]
    for layer in layers:
        dense = layer.shared.weight + sum(row[e] * layer.parts["weight"][e].dense() for e in range(3))
        torch.testing.assert_close(layer.materialized(row)["weight"], dense, **EXACT)


@torch.no_grad()
def test_layers_seen_in_different_company_keep_their_own_projection() -> None:
    slot = GateSlot()
    first, second, third = (linear_layer([1, 1], slot, bias=False) for _ in range(3))
    own = first.projection, second.projection, third.projection
    join_readers([[first, second], [second, third], [third, third]])
    assert (first.projection, second.projection, third.projection) == own


@torch.no_grad()
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), gate_kinds, paths, st.integers(0, 99))
def test_conv1d_of_transformers_is_a_transposed_linear_layer(
    ranks: list[int], kind: str, path: Path | None, seed: int
) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    slot, gate = GateSlot(), a_gate(kind, len(ranks))
    shared = Conv1D(OUT, IN).double()
    pairs = [factors(IN, OUT, rank) for rank in ranks]
    layer = GatedConv1D(shared, {"weight": dict(enumerate(pairs))}, len(ranks), slot)
    x = torch.randn(BATCH, TOKENS, IN, dtype=torch.float64)
    want = gated_linear(
        x, shared.weight.T, shared.bias, [p.down.T for p in pairs], [p.up.T for p in pairs], [None] * len(ranks), gate
    )
    with slot.use(GateContext(gate, path=path)):
        torch.testing.assert_close(layer(x), want, **EXACT)
    dense = shared.weight + sum(gate[0, e] * pair.dense() for e, pair in enumerate(pairs))
    torch.testing.assert_close(layer.materialized(gate[0])["weight"] if any(ranks) else dense, dense, **EXACT)


@torch.no_grad()
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), gate_kinds, paths, st.integers(0, 99))
def test_embedding_layer_is_its_formula(ranks: list[int], kind: str, path: Path | None, seed: int) -> None:
    torch.manual_seed(seed)
    slot, gate = GateSlot(), a_gate(kind, len(ranks))
    shared = nn.Embedding(11, OUT, dtype=torch.float64)
    pairs = [factors(11, OUT, rank) for rank in ranks]
    layer = GatedEmbedding(shared, {"weight": dict(enumerate(pairs))}, len(ranks), slot)
    ids = torch.randint(0, 11, (BATCH, TOKENS))
    want = gated_embedding(ids, shared.weight, [p.up for p in pairs], [p.down for p in pairs], gate)
    with slot.use(GateContext(gate, path=path)):
        torch.testing.assert_close(layer(ids), want, **EXACT)
        positions = layer(ids[:1]).expand(BATCH, -1, -1)
    same = gated_embedding(
        ids[:1].expand(BATCH, -1), shared.weight, [p.up for p in pairs], [p.down for p in pairs], gate
    )
    torch.testing.assert_close(positions, same, **EXACT)


@torch.no_grad()
@given(gate_kinds, st.integers(0, 99))
def test_layer_norm_is_its_formula(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    slot, gate = GateSlot(), a_gate(kind, 3)
    shared = nn.LayerNorm(OUT, dtype=torch.float64)
    parts = {name: {e: Dense(torch.randn(OUT, dtype=torch.float64)) for e in range(3)} for name in ("weight", "bias")}
    layer = GatedNorm(shared, parts, 3, slot)
    x = torch.randn(BATCH, TOKENS, OUT, dtype=torch.float64)
    weights, biases = ([parts[name][e].values for e in range(3)] for name in ("weight", "bias"))
    want = gated_layer_norm(x, shared.weight, shared.bias, weights, biases, gate, shared.eps)
    kept = x.clone()
    with slot.use(GateContext(gate)):
        torch.testing.assert_close(layer(x), want, **EXACT)
    assert torch.equal(x, kept)


@torch.no_grad()
@pytest.mark.parametrize("path", ["all", "gather"])
def test_a_row_does_not_depend_on_its_batch_mates(path: Path) -> None:
    torch.manual_seed(0)
    slot, gate = GateSlot(), a_gate("two experts", 4)
    layer, x = linear_layer([2, 1, 3, 0], slot, bias=True), torch.randn(BATCH, TOKENS, IN, dtype=torch.float64)
    with slot.use(GateContext(gate, path=path)):
        together = layer(x)
    for row in range(BATCH):
        with slot.use(GateContext(gate[row : row + 1], path=path)):
            torch.testing.assert_close(layer(x[row : row + 1])[0], together[row], **EXACT)


@torch.no_grad()
def test_a_gate_serves_rows_repeated_for_beams_and_packed_tokens() -> None:
    torch.manual_seed(0)
    slot, gate = GateSlot(), a_gate("soft", 2)
    layer, x = linear_layer([2, 1], slot, bias=True), torch.randn(BATCH, TOKENS, IN, dtype=torch.float64)
    with slot.use(GateContext(gate)):
        torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1), **EXACT)
        with pytest.raises(GateError, match="a gate of 5 rows cannot serve a layer's 7 rows"):
            layer(x.flatten(0, 1)[:7])


@given(st.integers(2, 8), st.floats(0, 0.3), st.integers(0, 99))
def test_dropped_gates_move_a_row_by_at_most_twice_what_they_held(experts: int, below: float, seed: int) -> None:
    torch.manual_seed(seed)
    gate = (4 * torch.randn(BATCH, experts, dtype=torch.float64)).softmax(dim=1)
    kept = keep_large(gate, below)
    dropped = torch.where(kept == 0, gate, 0).sum(dim=1)
    assert bool((dropped <= (experts - 1) * below + 1e-12).all())
    torch.testing.assert_close((kept - gate).abs().sum(dim=1), 2 * dropped, **EXACT)
    torch.testing.assert_close(kept.sum(dim=1), torch.ones(BATCH, dtype=torch.float64), **EXACT)
    assert torch.equal(kept.argmax(dim=1), gate.argmax(dim=1))
    assert not keep_large(torch.zeros(1, experts), below).any()


@torch.no_grad()
def test_dropping_moves_a_layer_by_no_more_than_its_bound() -> None:
    torch.manual_seed(0)
    slot, gate = GateSlot(), (3 * torch.randn(BATCH, 4, dtype=torch.float64)).softmax(dim=1)
    layer, x = linear_layer([2, 2, 2, 2], slot, bias=False), torch.randn(BATCH, 1, IN, dtype=torch.float64)
    kept = keep_large(gate, 0.1)
    with slot.use(GateContext(gate)):
        exact = layer(x)
    with slot.use(GateContext(kept)):
        moved = (layer(x) - exact).norm(dim=2)[:, 0]
    parts = torch.stack([(x @ pair.dense().T).norm(dim=2)[:, 0] for pair in layer.parts["weight"].values()])
    dropped = torch.where(kept == 0, gate, 0).sum(dim=1)
    assert bool((moved <= 2 * dropped * parts.amax(dim=0) + 1e-12).all())


def test_the_cheaper_path_is_taken() -> None:
    ranks = (Ranks.of((8,) * 64),)
    top = torch.eye(64)[torch.arange(32)]
    assert GateContext(top).path(ranks, tokens=64) == "gather"
    assert GateContext(top[:2]).path(ranks, tokens=1) == "all"
    assert GateContext(torch.full((32, 64), 1 / 64) + top).path(ranks, tokens=64) == "all"
    assert GateContext(top[:1].expand(32, -1)).path(ranks, tokens=64) == "all"


def test_extra_work_depends_on_the_experts_in_use_and_not_on_their_number() -> None:
    for experts in (8, 64, 256):
        context = GateContext(torch.eye(experts)[torch.arange(8)])
        picked = context.picked("gather", (Ranks.of((8,) * experts),), torch.float32)
        assert picked.gate.shape == (8, 1, 8)


def test_busy_rows_do_not_widen_the_others() -> None:
    gate = torch.eye(8)[torch.arange(8)]
    gate[3] = torch.tensor([0.4, 0.3, 0.1, 0.2, 0, 0, 0, 0])
    context, ranks = GateContext(gate), (Ranks.of((8,) * 8), Ranks.of((2, 4) * 4))
    step = context.step(ranks, 64, torch.float32)
    assert step.path == "gather"
    assert step.all_rows.picked.gate.shape == (8, 1, 8 + 4)
    assert step.busy_rows is not None
    assert step.busy_rows.rows is not None
    assert step.busy_rows.rows.tolist() == [3]
    assert step.busy_rows.picked.gate.shape == (1, 1, 3 * (8 + 4))
    assert GateContext(torch.full((8, 8), 1 / 8), path="gather").step(ranks, 64, torch.float32).busy_rows is None
    one_token = GateContext(gate, keep=True).step(ranks, 1, torch.float32)
    assert one_token.busy_rows is None
    assert one_token.by_expert is not None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_one_token_are_gathered_by_expert(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slot, gate = GateSlot(), torch.eye(4, dtype=torch.float64)[torch.arange(6) % 3]
    gate[2] = torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)
    gate[5] = torch.tensor([0.0, 0.6, -0.4, 0.0], dtype=torch.float64)
    gate[3] = 0
    exact = {}
    for bias in (False, True):
        layer, x = linear_layer([2, 1, 3, 0], slot, bias=bias), torch.randn(6, 1, IN, dtype=torch.float64)
        for row in range(6):
            dense = layer.materialized(gate[row])
            exact[row] = torch.nn.functional.linear(x[row], dense["weight"], dense.get("bias", layer.shared.bias))
        layer.to(dtype)
        with slot.use(GateContext(gate, keep=True)):
            for _ in range(2):  # the second time from what is kept
                found = layer(x.to(dtype))
        assert found.dtype == dtype
        for row in range(6):
            error = (found[row].double() - exact[row]).norm() / exact[row].norm()
            assert float(error) < 4 * torch.finfo(dtype).eps


@torch.no_grad()
def test_busy_rows_get_their_dense_weights() -> None:
    torch.manual_seed(0)
    slot, gate = GateSlot(), torch.eye(4, dtype=torch.float64)[torch.arange(6) % 4]
    gate[2], gate[5] = torch.tensor([0.5, 0.1, 0.1, 0.3]).double(), torch.tensor([0, 0.6, 0.4, 0]).double()
    layer, x = linear_layer([2, 1, 3, 2], slot, bias=True), torch.randn(6, 5, IN, dtype=torch.float64)
    with slot.use(GateContext(gate, path="gather")):
        found = layer(x)
        assert slot.context is not None
        assert slot.context.busy is not None
    for row in range(6):
        dense = layer.materialized(gate[row])
        want = torch.nn.functional.linear(x[row], dense["weight"], dense["bias"])
        torch.testing.assert_close(found[row], want, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["soft", "one expert", "zero", "same for all"])
def test_convolutions_are_their_dense_weights_row_by_row(kind: str, groups: int) -> None:
    torch.manual_seed(0)
    slot, gate = GateSlot(), a_gate(kind, 3)
    shared = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, dtype=torch.float64)
    wide = shared.weight[0].numel()
    parts = {
        "weight": {0: factors(6, wide, 2), 1: factors(6, wide, 1), 2: keep_largest(torch.randn(6, wide).double(), 0.3)},
        "bias": {e: Dense(torch.randn(6, dtype=torch.float64)) for e in range(3)},
    }
    layer = (GatedConv if groups == 1 else GatedGroupedConv)(shared, parts, 3, slot)
    x = torch.randn(BATCH, 4, 5, 5, dtype=torch.float64)
    with slot.use(GateContext(gate)):
        found = layer(x)
    for row in range(BATCH):
        dense = layer.materialized(gate[row])
        difference = sum(gate[row, e] * parts["weight"][e].dense() for e in range(3))
        torch.testing.assert_close(dense["weight"], shared.weight + difference.reshape(shared.weight.shape), **EXACT)
        want = nn.functional.conv2d(x[row : row + 1], dense["weight"], dense["bias"], 2, 1, groups=groups)
        torch.testing.assert_close(found[row : row + 1], want, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["soft", "one expert", "zero"])
def test_sparse_parts_of_linear_layers_are_their_dense_weights(kind: str) -> None:
    torch.manual_seed(0)
    slot, gate = GateSlot(), a_gate(kind, 2)
    shared = nn.Linear(IN, OUT, dtype=torch.float64)
    parts = [keep_largest(torch.randn(OUT, IN).double(), 0.4) for _ in range(2)]
    layer = GatedLinear(shared, {"weight": dict(enumerate(parts))}, 2, slot)
    x = torch.randn(BATCH, TOKENS, IN, dtype=torch.float64)
    with slot.use(GateContext(gate)):
        found = layer(x)
    for row in range(BATCH):
        dense = shared.weight + sum(gate[row, e] * part.dense() for e, part in enumerate(parts))
        torch.testing.assert_close(found[row], x[row] @ dense.T + shared.bias, **EXACT)
