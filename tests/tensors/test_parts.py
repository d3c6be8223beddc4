"""Every form of exclusive knowledge behind one protocol: the same questions, the same answers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twinmerge.tensors.float8 import EIGHT_BITS, Quantised, to_eight_bits
from twinmerge.tensors.int4 import FOUR_BITS, to_four_bits
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import FORMS, Dense, Part, of_form, unpack
from twinmerge.tensors.sparse import Sparse, keep_largest


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


MADE: dict[str, Callable[[], Part]] = {
    "factors": lambda: LowRank(random(4, 2), random(2, 3)),
    "no factors": lambda: LowRank(random(4, 0), random(0, 3)),
    "8 bits": lambda: to_eight_bits(LowRank(random(4, 2), random(2, 3)), "it"),
    "4 bits": lambda: to_four_bits(LowRank(random(4, 2), random(2, 3))),
    "entries": lambda: keep_largest(random(4, 3), 0.5),
    "whole": lambda: Dense(random(4)),
    "one number": lambda: Dense(random()),
}


@pytest.mark.parametrize("form", MADE)
def test_packed_part_is_unpacked_to_the_bit(form: str) -> None:
    part = MADE[form]()
    packed = part.pack()
    found = unpack(packed, (4, 3))
    assert type(found) is type(part)
    assert frozenset(packed) in FORMS
    assert all(torch.equal(tensor.double(), packed[leaf].double()) for leaf, tensor in found.pack().items())
    assert found.nbytes == sum(tensor.nbytes for tensor in packed.values())


@pytest.mark.parametrize("form", MADE)
def test_energy_is_the_squared_norm_of_the_difference(form: str) -> None:
    part = MADE[form]()
    assert part.shape == part.dense().shape
    assert part.energy() == pytest.approx(float(part.dense().double().square().sum()), rel=1e-6)  # a float32 product


@pytest.mark.parametrize("form", MADE)
def test_other_dtype_holds_the_same_numbers(form: str) -> None:
    part = MADE[form]()
    wide = part.to(torch.float64)
    assert part.dtype in (torch.float32, EIGHT_BITS, FOUR_BITS)
    assert wide.dtype == torch.float64
    assert torch.allclose(wide.dense(), part.dense().double(), atol=1e-6)


def test_pair_of_8_bits_stays_one_when_it_is_cut_and_is_a_pair_of_factors_when_it_is_widened() -> None:
    part = to_eight_bits(LowRank(random(4, 2), random(2, 3)), "it")
    assert type(part.truncate(1)) is Quantised
    assert type(part.to(torch.float32)) is LowRank


def test_parts_of_one_form_are_found() -> None:
    parts = {form: make() for form, make in MADE.items()}
    assert set(of_form(parts, LowRank)) == {"factors", "no factors", "8 bits"}
    assert set(of_form(parts, Sparse)) == {"entries"}
    assert set(of_form(parts, Dense)) == {"whole", "one number"}
