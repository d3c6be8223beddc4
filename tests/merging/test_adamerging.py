"""AdaMerging, given its coefficients: what is added to the base, and what trimming leaves of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.merging.memory import chunks, merge, models
from twinmerge.files.checkpoint import Checkpoint
from twinmerge.files.writer import save_tensors
from twinmerge.merging.adamerging import AdaMerging, agreeing
from twinmerge.merging.statistics import Statistics


def coefficients(folder: Path, base: dict[str, Tensor], experts: list[str], trimmed: object = None) -> Statistics:
    """Of every expert and tensor another, of the bias none."""
    data = {}
    for row, expert in enumerate(sorted(experts)):
        found = {name: torch.tensor([0.1 + 0.2 * row + 0.05 * i]).double() for i, name in enumerate(base)}
        found.pop("bias", None)
        save_tensors(found, folder / f"{expert}.safetensors")
        data[expert] = Checkpoint.open(folder / f"{expert}.safetensors")
    return Statistics(model=trimmed, data=data)


@pytest.mark.parametrize("entries", [5, 1000])
def test_each_tensor_is_the_base_and_task_vectors_by_their_coefficients(tmp_path: Path, entries: int) -> None:
    base, experts = models(3)
    found = merge(AdaMerging(), base, experts, entries=entries, statistics=coefficients(tmp_path, base, list(experts)))
    for i, name in enumerate(base):
        shares = [1 / 3] * 3 if name == "bias" else [0.1 + 0.2 * row + 0.05 * i for row in range(3)]
        vectors = [experts[f"e{row}"][name].double() - base[name].double() for row in range(3)]
        expected = base[name] + sum(share * vector for share, vector in zip(shares, vectors, strict=True))
        assert torch.allclose(found[name], expected, atol=1e-6)


def test_trimmed_vectors_are_large_and_agree(tmp_path: Path) -> None:
    base, experts = models(3)
    method = AdaMerging(trimmed=True, density=0.3)
    smallest = method.prepass(lambda: chunks(base, experts))
    found = merge(method, base, experts, statistics=coefficients(tmp_path, base, list(experts), smallest))
    whole = {e: torch.cat([(s[n] - base[n]).flatten() for n in base]) for e, s in experts.items()}
    kept = {e: reference.trim(vector, 0.3) for e, vector in whole.items()}
    signs = torch.stack(list(kept.values())).sum(0).sign()
    kept = {e: vector * (vector * signs > 0) for e, vector in kept.items()}
    at = 0
    for i, name in enumerate(base):
        part = slice(at, at + base[name].numel())
        at = part.stop
        shares = [1 / 3] * 3 if name == "bias" else [0.1 + 0.2 * row + 0.05 * i for row in range(3)]
        change = sum(share * kept[f"e{row}"][part].double() for row, share in enumerate(shares))
        assert torch.allclose(found[name].flatten(), base[name].flatten().double() + change, atol=1e-6)


def test_nothing_is_left_out_where_all_agree_and_nothing_is_trimmed() -> None:
    vectors = {"a": torch.tensor([1.0, -2.0, 0.0]), "b": torch.tensor([0.5, -1.0, 3.0])}
    found = agreeing({name: vector.clone() for name, vector in vectors.items()}, {})
    assert all(torch.equal(found[name], vectors[name]) for name in vectors)
    assert AdaMerging().prepass(lambda: iter([])) == {}
