"""Any torch module under a gate: fast where a layer is known and sees the batch's rows, exact everywhere."""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinmerge.errors import GateError
from twinmerge.runtime.compose import theta
from twinmerge.runtime.module import TwinModule
from twinmerge.tensors.low_rank import LowRank, as_matrix, decompose
from twinmerge.tensors.parts import Dense, Part

EXPERTS, SIZE, TOKENS = 3, 6, 5
DOUBLE = torch.float64


class Block(nn.Module):
    """Reads its weights in every way that makes a plain layer's gate wrong somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
        self.norm = nn.LayerNorm(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.norm(x + self.first(x) * self.second(x))
        return mixed


class ReadByOthers(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.second.weight

    slow = ("second.weight",)


class AsksForTheDtype(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.second.weight.dtype)).reshape(len(x), -1, self.second.weight.shape[0])

    slow = ()


class WithATable(Block):
    """Rows of a table, not of the batch, as many as some batch might have."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.key = nn.Embedding(6, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.key(self.table(torch.arange(6)))[:TOKENS]

    slow = ("table.weight", "key.weight", "key.bias")


class SortedTokens(Block):
    """A mixture's way: tokens of all rows in another order."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        order = flat[:, 0].argsort()
        return super().forward(flat[order])[order.argsort()].view_as(x)

    slow = ("first.weight", "first.bias", "second.weight", "norm.weight", "norm.bias")


class TokenFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)

    slow = SortedTokens.slow


class FreeParameters(Block):
    """A class token, a float buffer, a number: nothing that a layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, SIZE)), nn.Parameter(torch.tensor(0.5))
        self.register_buffer("level", torch.rand(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return super().forward(x * self.scale + self.level)

    slow = ("token", "scale", "level")


class Attention(Block):
    """Torch's own reads its output projection's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.attention(x, x, x, need_weights=False)[0])

    slow = tuple(f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"))


class Tied(Block):
    """One weight in a fast place and in one that is not: neither may add what the other merged."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Bilinear(SIZE, 1, SIZE, bias=False)
        self.again.weight = nn.Parameter(torch.randn(SIZE, SIZE, 1))
        self.first.weight = nn.Parameter(self.second.weight.detach())
        self.second.weight = self.first.weight

    slow = ("again.weight",)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(x, x[..., :1].contiguous())


class TwicePlaced(Block):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.first

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.alias(x)

    slow = ()


class Mixture(Block):
    """Experts of a mixture see the tokens that chose them; one of these is chosen by none of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(SIZE, 3)
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen, found = self.choose(x).argmax(dim=-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                found[chosen == index] = expert(x[chosen == index])
        return super().forward(x + found)

    slow = tuple(f"experts.{index}.{leaf}" for index in range(3) for leaf in ("weight", "bias"))


MODULES = [Block, ReadByOthers, AsksForTheDtype, WithATable, SortedTokens, TokenFirst, FreeParameters, Attention, Tied,
           TwicePlaced, Mixture]  # fmt: skip


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    floating = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    return {name: value.detach() for name, value in (dict(module.named_parameters()) | floating).items()}


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(module)
    for name, tensor in {**dict(made.named_parameters()), **dict(made.named_buffers())}.items():
        tensor.data.copy_(weights[name])
    return made


def part_of(difference: Tensor) -> Part:
    return decompose(as_matrix(difference))[0] if difference.ndim > 1 else Dense(difference)


def parts_of(module: nn.Module, seed: int = 0) -> dict[str, dict[str, Part]]:
    """Every parameter and float buffer of every expert differs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"e{expert}": {
            name: part_of(0.3 * torch.randn(value.shape, generator=generator, dtype=DOUBLE))
            for name, value in tensors_of(module).items()
        }
        for expert in range(EXPERTS)
    }


def example(rows: int) -> Mapping[str, Tensor]:
    return {"x": torch.randn(rows, TOKENS, SIZE, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)}


def twin_of(module: nn.Module, **settings: Any) -> tuple[TwinModule, Callable[[Tensor, Tensor], Tensor]]:
    """A twin, and the slow formula: every row with its own weights."""
    plain, parts = copy.deepcopy(module), parts_of(module)

    def rowwise(x: Tensor, gate: Tensor) -> Tensor:
        weights = [theta(tensors_of(plain), list(parts.values()), row) for row in gate]
        with torch.no_grad():
            return torch.cat([with_weights(plain, own)(row[None]) for row, own in zip(x, weights, strict=True)])

    return TwinModule(module, parts, **{"example": example, **settings}), rowwise


GATES = {
    "mixed": torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0], [0, 0, 1.2], [0.2, 0.3, 0.5]], dtype=DOUBLE),
    "one each": torch.eye(3, dtype=DOUBLE)[[0, 1, 2, 1]],
    "one for all": torch.tensor([[0.5, 0.25, 0.25]], dtype=DOUBLE).expand(4, -1),
    "some zero": torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0.5, 0.5, 0]], dtype=DOUBLE),
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("kind", MODULES)
def test_any_module_is_every_row_with_its_own_weights(kind: type[nn.Module], gate: Tensor) -> None:
    twin, rowwise = twin_of(made(kind))
    x = torch.randn(4, TOKENS, SIZE, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    torch.testing.assert_close(twin(gate, x=x), rowwise(x, gate), atol=1e-10, rtol=1e-10)
    for row in (0, 3):
        alone = twin(gate[row : row + 1], x=x[row : row + 1])
        torch.testing.assert_close(alone, rowwise(x, gate)[row : row + 1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", MODULES)
def test_paths_say_what_goes_by_the_fall_back(kind: type[nn.Module]) -> None:
    twin, _ = twin_of(made(kind))
    slow = {name for name, way in twin.paths().items() if way == "fallback"}
    assert slow == set(getattr(kind, "slow", ()))
    assert twin.paths().keys() == tensors_of(made(kind)).keys()


@pytest.mark.parametrize("kind", MODULES)
def test_no_gate_and_a_gate_of_zeros_are_the_shared_module(kind: type[nn.Module]) -> None:
    plain, (twin, _) = made(kind), twin_of(made(kind))
    x = example(4)["x"]
    with torch.inference_mode():
        wanted = plain(x)
    # to the bit where sums do not depend on how a batch lies in memory
    assert torch.equal(twin(None, x=x), wanted) or kind is TokenFirst
    torch.testing.assert_close(twin(torch.zeros(4, 3, dtype=DOUBLE), x=x), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", MODULES)
def test_values_for_a_gate_are_the_dense_reference(kind: type[nn.Module]) -> None:
    module = made(kind)
    shared, parts, gate = tensors_of(module), parts_of(module), GATES["mixed"][0]
    twin = TwinModule(module, parts, example=example)
    state, wanted = twin.state_for(gate), theta(shared, list(parts.values()), gate)
    assert all(torch.allclose(state[name], wanted[name], atol=1e-12) for name in wanted)


@pytest.mark.parametrize("settings", [{"example": None}, {"fallback": ["second.weight"]}, {"merge_bytes": 0}])
def test_what_nothing_is_known_of_or_what_is_named_goes_by_the_fall_back(settings: dict[str, Any]) -> None:
    twin, rowwise = twin_of(made(Block), **settings)
    x, gate = example(4)["x"], GATES["mixed"]
    torch.testing.assert_close(twin(gate, x=x), rowwise(x, gate), atol=1e-10, rtol=1e-10)
    slow = [name for name, way in twin.paths().items() if way == "fallback"]
    assert len(slow) == {"example": 5, "fallback": 1, "merge_bytes": 0}[next(iter(settings))]


def test_a_dry_run_that_fails_leaves_everything_to_the_fall_back() -> None:
    twin, rowwise = twin_of(made(Block), example=lambda rows: {"x": torch.ones(rows, 2, SIZE + 1, dtype=DOUBLE)})
    assert set(twin.paths().values()) == {"fallback"}
    assert "RuntimeError" in twin.why_slow["first"]
    x, gate = example(4)["x"], GATES["mixed"]
    torch.testing.assert_close(twin(gate, x=x), rowwise(x, gate), atol=1e-10, rtol=1e-10)


def test_a_dry_run_changes_nothing_of_the_module() -> None:
    module = made(WithATable)
    before, state = {n: type(p) for n, p in module.named_parameters()}, torch.get_rng_state()
    TwinModule(module, {"a": {}, "b": {}}, example=example)
    found, _ = twin_of(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: type(p) for n, p in found.module.named_parameters()}.items() >= {
        n: t for n, t in before.items() if n.startswith(("table", "key"))
    }.items()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.modules())


def test_layers_that_read_one_input_share_a_projection_from_the_start() -> None:
    twin, _ = twin_of(made(Block))
    assert twin.gated["first"].projection is twin.gated["second"].projection


@pytest.mark.parametrize("experts", [[0], [1, 2]])
def test_rows_are_grouped_by_the_gates_of_experts_with_parts_there(experts: list[int]) -> None:
    module = made(FreeParameters)
    parts = {
        e: {n: p for n, p in own.items() if i in experts or n not in FreeParameters.slow}
        for i, (e, own) in enumerate(parts_of(module).items())
    }
    twin = TwinModule(module, parts, example=example)
    gate = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.3, 0.2], [0, 1, 0], [0.5, 0.2, 0.3]], dtype=DOUBLE)
    assert len(twin.fallback.groups(gate)) == (2 if experts == [0] else 3)
    shared = tensors_of(made(FreeParameters))
    x = example(4)["x"]
    found = twin(gate, x=x)
    for row in range(4):
        weights = theta(shared, list(parts.values()), gate[row])
        with torch.no_grad():
            want = with_weights(made(FreeParameters), weights)(x[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], want, atol=1e-10, rtol=1e-10)


class Packed(FreeParameters):
    """Rows of different lengths in one, as packed images are; the second input says which token is whose."""

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        mixed = Block.forward(self, x * self.scale + self.level)
        sums = torch.stack([part.sum(dim=0) for part in mixed.split(lengths.tolist())])
        return {"sums": sums, "pair": (sums[:, :1], sums.mean()), "none": None}


def test_rows_that_inputs_do_not_show_are_still_each_their_own() -> None:
    module = made(Packed)
    plain, parts = made(Packed), parts_of(module)

    def packed(rows: int) -> Mapping[str, Tensor]:
        lengths = torch.arange(1, rows + 1)
        x = torch.randn(int(lengths.sum()), SIZE, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
        return {"x": x, "lengths": lengths}

    twin = TwinModule(module, parts, example=packed)
    assert set(twin.paths().values()) == {"fallback"}
    gate, inputs = GATES["mixed"], packed(4)
    found = twin(gate, **inputs)
    for row in range(4):
        weights = theta(tensors_of(plain), list(parts.values()), gate[row])
        with torch.no_grad():
            want = with_weights(plain, weights)(inputs["x"], inputs["lengths"])
        torch.testing.assert_close(found["sums"][row], want["sums"][row], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(found["pair"][0][row], want["pair"][0][row], atol=1e-10, rtol=1e-10)
    assert found["pair"][1] is None  # a mean over rows of different weights is nobody's
    assert found["none"] is None


class Shortened(FreeParameters):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, : 2 + int(self.scale > 0.7)]


def test_outputs_of_different_lengths_are_refused_or_filled_up() -> None:
    module = made(Shortened)
    parts = {"a": {"scale": Dense(torch.tensor(0.4, dtype=DOUBLE))}, "b": {"scale": Dense(torch.tensor(0.1).double())}}
    twin = TwinModule(module, parts, example=example)
    gate, x = torch.eye(2, dtype=DOUBLE), example(2)["x"]
    with pytest.raises(GateError, match="rows of different gates gave outputs of different lengths"):
        twin(gate, x=x)
    filled = twin.run(lambda m, own: m(**own)[:, :, 0], gate, {"x": x}, tokens=2, pad=7)
    assert filled[1].tolist()[2:] == [7.0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda twin: pickle.loads(pickle.dumps(twin))])
def test_a_copy_of_a_gated_module_stands_on_its_own(copied: Any) -> None:
    twin, _ = twin_of(made(FreeParameters))
    x, gate = example(4)["x"], GATES["mixed"]
    wanted = twin(gate, x=x)
    found = copied(twin)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    assert torch.equal(found(gate, x=x), wanted)


def test_merged_modules_are_kept_within_the_bytes_they_may_take() -> None:
    twin, _ = twin_of(made(FreeParameters), merge_bytes=250)
    x, gate = example(4)["x"], GATES["one each"]
    size = sum(tensors_of(made(FreeParameters))[name].nbytes for name in FreeParameters.slow)
    assert 2 * size <= 250 < 3 * size
    wanted = twin(gate, x=x)
    assert twin.merged.nbytes == 2 * size
    assert torch.equal(twin(gate, x=x), wanted)
    twin.to(torch.float32)
    assert twin.merged.nbytes == 0


def test_parts_of_eight_bits_are_widened() -> None:
    from twinmerge.tensors.float8 import to_eight_bits

    torch.manual_seed(0)
    pair = to_eight_bits(LowRank(torch.randn(SIZE, 2), torch.randn(2, SIZE)), "it")
    module = made(Block)
    weight = module.second.weight.detach().clone()
    twin = TwinModule(module, {"a": {"second.weight": pair}}, example=example)
    found = twin.state_for(torch.ones(1, dtype=DOUBLE))["second.weight"]
    assert torch.allclose(found, weight + pair.dense().double())
