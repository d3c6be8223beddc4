"""Routers that look at tokens: n-grams against scikit-learn's tf-idf, mixtures, cascades, files."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from twinmerge.errors import DataError, GateError
from twinmerge.routing.router import Router, fit_router
from twinmerge.routing.tokens import PADDING, NgramHead, join_ids, stack_ids, token_ids
from twinmerge.twin.recipe import RouterSettings

EXPERTS = ("ag", "sms", "trec")


def sentences(rows: int = 80, own: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    """Rows of 12 tokens: some from an expert's own fifty, the others from a hundred that all use."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, name in enumerate(EXPERTS):
        mine = torch.rand(rows, 12, generator=generator) < own
        own_ids = 100 + 50 * index + torch.randint(50, (rows, 12), generator=generator)
        found[name] = torch.where(mine, own_ids, torch.randint(100, (rows, 12), generator=generator))
    return found


def features(seed: int = 0, rows: int = 80) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, 4, generator=generator) + 1.5 * torch.eye(4)[index]
        for index, name in enumerate(EXPERTS)
    }


def stacked(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(list(data.values())), torch.arange(3).repeat_interleave(len(data["ag"]))


def head(seed: int = 0) -> NgramHead:
    made = NgramHead(3)
    made.fit(*stacked(sentences(seed=seed)), stacked(sentences(rows=20, seed=5)))
    return made


def accuracy(router: Router, own: float = 0.4) -> float:
    ids, labels = stacked(sentences(seed=9, own=own))
    states = stacked(features(seed=9))[0]
    found = router.decide(ids, lambda rows: states if rows is None else states[rows])
    return float((found.expert == labels).float().mean())


def test_vectors_are_those_of_scikit_learn() -> None:
    ids = stacked(sentences(rows=30))[0]
    made = head()
    made._choose_ngrams(ids)
    words = [[str(token) for token in row] for row in ids.tolist()]
    grams = {id(row): [*row, *(f"{a} {b}" for a, b in pairwise(row))] for row in words}
    vectorizer = TfidfVectorizer(analyzer=lambda row: grams[id(row)], min_df=2, sublinear_tf=True)
    expected = vectorizer.fit_transform(words)
    found = made._sparse(ids)
    assert found.shape == expected.shape
    assert np.allclose(np.sort(found.toarray(), axis=1), np.sort(expected.toarray(), axis=1), atol=1e-6)


def test_tokens_alone_find_the_expert() -> None:
    router = fit_router(None, RouterSettings(features="tokens"), seed=0, ids=sentences())
    assert accuracy(router) > 0.9  # chance is 1/3
    assert router.report["feature_size"] == 0


def test_two_experts() -> None:
    two = {name: rows for name, rows in sentences().items() if name != "trec"}
    router = fit_router(None, RouterSettings(features="tokens"), seed=0, ids=two)
    ids = sentences(seed=9)
    assert float((router(None, ids["sms"]).expert == 1).float().mean()) > 0.9
    assert float((router(None, ids["ag"]).expert == 0).float().mean()) > 0.9


def test_both_together_are_better_than_either() -> None:
    hard = {"ids": sentences(own=0.15)}
    tokens = fit_router(None, RouterSettings(features="tokens"), seed=0, **hard)
    hidden = fit_router(features(), RouterSettings(features="all"), seed=0)
    both = fit_router(features(), RouterSettings(features="all+tokens"), seed=0, **hard)
    assert accuracy(both, 0.15) > max(accuracy(tokens, 0.15), accuracy(hidden, 0.15)) + 0.02


def test_cascade_asks_for_features_of_uncertain_rows_only() -> None:
    settings = RouterSettings(features="cascade")
    router = fit_router(features(), settings, seed=0, ids=sentences(own=0.2))
    full = fit_router(features(), RouterSettings(features="all+tokens"), seed=0, ids=sentences(own=0.2))
    ids, states = stacked(sentences(seed=9, own=0.2))[0], stacked(features(seed=9))[0]
    asked: list[Tensor] = []

    def some(rows: Tensor | None) -> Tensor:
        assert rows is not None
        asked.append(rows)
        return states[rows]

    found = router.decide(ids, some)
    assert 0 < len(asked[0]) < len(ids)
    assert 0 < router.report["second_look"] < 1
    expected = full(states[asked[0]], ids[asked[0]])
    assert torch.allclose(found.gate[asked[0]], expected.gate)
    certain = [row for row in range(len(ids)) if row not in asked[0].tolist()]
    assert bool((found.gate[certain].amax(dim=1) >= router.ngrams.certainty).all())  # type: ignore[union-attr]
    assert torch.allclose(found.gate.sum(dim=1), 1.0 - found.fallback.float())


def test_cascade_without_uncertain_rows_never_asks() -> None:
    router = fit_router(features(), RouterSettings(features="cascade"), seed=0, ids=sentences())
    router.ngrams.certainty.fill_(0)  # type: ignore[union-attr]
    assert len(router.decide(stacked(sentences())[0], lambda rows: pytest.fail("asked")).gate) == 240


def test_cascade_whose_tokens_are_always_wrong_trusts_none_of_them() -> None:
    ids = sentences(own=0.0)  # tokens say nothing
    router = fit_router(
        {n: 50.0 * torch.eye(4)[i].expand(80, 4) + torch.randn(80, 4) for i, n in enumerate(EXPERTS)},
        RouterSettings(features="cascade"),
        seed=0,
        ids=ids,
    )
    assert router.report["accuracy"] == 1.0
    assert router.report["second_look"] > 0.9


def test_input_of_unknown_tokens_is_left_to_the_shared_expert() -> None:
    router = fit_router(None, RouterSettings(features="tokens"), seed=0, ids=sentences())
    known = sentences(seed=9)["ag"][:3]
    found = router(None, torch.cat([known, torch.full((1, 12), 999)]))
    assert found.fallback.tolist() == [False, False, False, True]
    assert not bool(found.gate[3].any())


@given(st.integers(0, 6), st.integers(0, 2**31))
def test_padding_and_neighbours_change_nothing(pad: int, seed: int) -> None:
    ids = stacked(sentences(rows=2, seed=seed))[0]
    router = fitted_once()
    wide = torch.nn.functional.pad(ids, (0, pad), value=PADDING)
    alone = torch.cat([router(None, row[None]).router_logits for row in ids])
    assert torch.allclose(router(None, wide).router_logits, alone, atol=1e-6)


_once: list[Router] = []


def fitted_once() -> Router:
    if not _once:
        _once.append(fit_router(None, RouterSettings(features="tokens"), seed=0, ids=sentences()))
    return _once[0]


@pytest.mark.parametrize("spec", ["tokens", "all+tokens", "cascade", "last+tokens", "layers:[0,1]+tokens"])
@pytest.mark.parametrize("method", ["linear", "knn"])
def test_saved_and_loaded_router_routes_to_the_bit(spec: str, method: str, tmp_path: Path) -> None:
    router = fit_router(features(), RouterSettings(features=spec, method=method), seed=0, ids=sentences())
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    ids, states = stacked(sentences(seed=9))[0], stacked(features(seed=9))[0]
    first, second = (r.decide(ids, lambda rows: states if rows is None else states[rows]) for r in (router, loaded))
    assert torch.equal(first.gate, second.gate)
    assert loaded.report == router.report


def test_order_of_experts_does_not_matter() -> None:
    turned = dict(reversed(sentences().items()))
    first, second = (fit_router(None, RouterSettings(features="tokens"), seed=3, ids=d) for d in (sentences(), turned))
    ids = stacked(sentences(seed=9))[0]
    assert torch.equal(first(None, ids).gate, second(None, ids).gate)


def test_ids_of_a_batch() -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 0], [7, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert token_ids(inputs).tolist() == [[5, 6, PADDING], [7, PADDING, PADDING]]
    assert token_ids({"input_ids": torch.tensor([[5, 6]])}).tolist() == [[5, 6]]
    assert stack_ids([torch.tensor([1]), torch.tensor([2, 3])]).tolist() == [[1, PADDING], [2, 3]]
    assert join_ids([torch.tensor([[1]]), torch.tensor([[2, 3]])]).tolist() == [[1, PADDING], [2, 3]]


def test_input_without_tokens_is_refused() -> None:
    with pytest.raises(GateError, match="needs input_ids, found pixel_values"):
        token_ids({"pixel_values": torch.zeros(1, 3, 2, 2)})


def test_router_data_without_common_tokens_is_refused() -> None:
    ids = {name: (1000 * i + torch.arange(40)).view(10, 4) for i, name in enumerate(EXPERTS)}
    with pytest.raises(DataError, match="no token occurs in two inputs"):
        fit_router(None, RouterSettings(features="tokens"), seed=0, ids=ids)


def test_very_many_ngrams_are_cut_to_the_most_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinmerge.routing.tokens._MOST_NGRAMS", 20)
    made = head()
    assert len(made.keys) == 20
    assert bool((made.keys[1:] > made.keys[:-1]).all())
