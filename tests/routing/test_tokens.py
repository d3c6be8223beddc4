"""Routers that look at tokens: n-grams against scikit-learn's tf-idf, mixtures, cascades, files."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from tests.tiny import rewrite
from twinmerge.errors import ArtifactError, DataError, GateError
from twinmerge.routing.fit import fit_router
from twinmerge.routing.router import Examples, Router, Routing, Stored
from twinmerge.routing.store import load_router, save_router
from twinmerge.routing.tokens import PADDING, NgramHead, stack_ids, token_ids
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

EXPERTS = ("ag", "sms", "trec")
ALL = Layers("all")


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
    made.fit(examples(sentences(seed=seed)), examples(sentences(rows=20, seed=5)))
    return made


def examples(ids: dict[str, Tensor]) -> Examples:
    rows, labels = stacked(ids)
    return Examples(Stored({}, rows), labels, torch.ones(len(rows)))


def fitted(
    words: str, ids: dict[str, Tensor] | None = None, states: dict[str, Tensor] | None = None, **given: Any
) -> Router:
    """A router of such features; the rows of ids and states are the same."""
    settings = RouterSettings(features=words, **given)
    first = ids if ids is not None else states
    assert first is not None
    owners = [name for name, rows in first.items() for _ in rows]
    layers = settings.features.layers
    known = {} if layers is None or states is None else {layers: torch.cat(list(states.values()))}
    return fit_router(Stored(known, None if ids is None else torch.cat(list(ids.values()))), owners, settings, seed=0)


def routed(router: Router, ids: Tensor, states: Tensor | None = None) -> Routing:
    layers = router.settings.features.layers
    return router.route(Stored({} if layers is None or states is None else {layers: states}, ids))


def accuracy(router: Router, own: float = 0.4) -> float:
    ids, labels = stacked(sentences(seed=9, own=own))
    found = routed(router, ids, stacked(features(seed=9))[0])
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
    router = fitted("tokens", sentences())
    assert accuracy(router) > 0.9  # chance is 1/3
    assert router.report["feature_size"] == 0


def test_two_experts() -> None:
    two = {name: rows for name, rows in sentences().items() if name != "trec"}
    router = fitted("tokens", two)
    ids = sentences(seed=9)
    assert float((routed(router, ids["sms"]).expert == 1).float().mean()) > 0.9
    assert float((routed(router, ids["ag"]).expert == 0).float().mean()) > 0.9


def test_both_together_are_better_than_either() -> None:
    hard = sentences(own=0.15)
    tokens, hidden, both = (
        fitted("tokens", hard),
        fitted("all", None, features()),
        fitted("all+tokens", hard, features()),
    )
    assert accuracy(both, 0.15) > max(accuracy(tokens, 0.15), accuracy(hidden, 0.15)) + 0.02


def test_cascade_asks_for_features_of_uncertain_rows_only() -> None:
    router = fitted("cascade", sentences(own=0.2), features())
    full = fitted("all+tokens", sentences(own=0.2), features())
    ids, states = stacked(sentences(seed=9, own=0.2))[0], stacked(features(seed=9))[0]
    asked: list[Tensor] = []

    class Watched(Stored):
        def take(self, rows: Tensor) -> Stored:
            asked.append(rows)
            return Stored({ALL: states}, ids).take(rows)

    found = router.route(Watched({}, ids))
    assert 0 < len(asked[0]) < len(ids)
    assert 0 < router.report["second_look"] < 1
    expected = routed(full, ids[asked[0]], states[asked[0]])
    assert torch.allclose(found.gate[asked[0]], expected.gate)
    certain = [row for row in range(len(ids)) if row not in asked[0].tolist()]
    assert bool((found.gate[certain].amax(dim=1) >= router.certainty).all())
    assert torch.allclose(found.gate.sum(dim=1), 1.0 - found.fallback.float())


def test_cascade_without_uncertain_rows_never_asks() -> None:
    router = fitted("cascade", sentences(), features())
    router.certainty.fill_(0)
    assert len(routed(router, stacked(sentences())[0]).gate) == 240  # there are no hidden states


def test_cascade_whose_tokens_are_always_wrong_trusts_none_of_them() -> None:
    ids = sentences(own=0.0)  # tokens say nothing
    states = {n: 50.0 * torch.eye(4)[i].expand(80, 4) + torch.randn(80, 4) for i, n in enumerate(EXPERTS)}
    router = fitted("cascade", ids, states)
    assert router.report["accuracy"] == 1.0
    assert router.report["second_look"] > 0.9


def test_input_of_unknown_tokens_is_left_to_the_shared_expert() -> None:
    router = fitted("tokens", sentences())
    known = sentences(seed=9)["ag"][:3]
    found = routed(router, torch.cat([known, torch.full((1, 12), 999)]))
    assert found.fallback.tolist() == [False, False, False, True]
    assert not bool(found.gate[3].any())


@given(st.integers(0, 6), st.integers(0, 2**31))
def test_padding_and_neighbours_change_nothing(pad: int, seed: int) -> None:
    ids = stacked(sentences(rows=2, seed=seed))[0]
    router = fitted_once()
    wide = torch.nn.functional.pad(ids, (0, pad), value=PADDING)
    alone = torch.cat([routed(router, row[None]).router_logits for row in ids])
    assert torch.allclose(routed(router, wide).router_logits, alone, atol=1e-6)


_once: list[Router] = []


def fitted_once() -> Router:
    if not _once:
        _once.append(fitted("tokens", sentences()))
    return _once[0]


@pytest.mark.parametrize("spec", ["tokens", "all+tokens", "cascade", "last+tokens", "layers:[0,1]+tokens"])
@pytest.mark.parametrize("method", ["linear", "knn"])
def test_saved_and_loaded_router_routes_to_the_bit(spec: str, method: str, tmp_path: Path) -> None:
    router = fitted(spec, sentences(), features(), method=method)
    save_router(router, tmp_path / "router")
    loaded = load_router(tmp_path / "router")
    ids, states = stacked(sentences(seed=9))[0], stacked(features(seed=9))[0]
    first, second = (routed(one, ids, states) for one in (router, loaded))
    assert torch.equal(first.gate, second.gate)
    assert loaded.report == router.report


@pytest.mark.parametrize("words", ["tokens", "all", "all+tokens", "cascade"])
def test_router_saved_before_gates_had_forms_is_read(words: str, tmp_path: Path) -> None:
    """Of format 1: its file held every tensor whatever the router looked at, and its gates were soft."""
    router = fitted(words, sentences(), features(), detector="distance")
    save_router(router, tmp_path / "router")
    content = json.loads((tmp_path / "router" / "router.json").read_text())
    for key in ("gate", "top_k", "detector"):
        del content["settings"][key]
    (tmp_path / "router" / "router.json").write_text(json.dumps(content))
    size = 4 if "all" in words or words == "cascade" else 0
    unused = {"mean": torch.zeros(size), "deviation": torch.ones(size), "centroids": torch.zeros(3, size)}
    unused |= {f"ngrams.{name}": torch.tensor(7.0) for name in ("share", "temperature", "certainty")}
    rewrite(tmp_path / "router" / "router.safetensors", lambda stored: {**unused, **stored})
    ids, states = stacked(sentences(seed=9))[0], stacked(features(seed=9))[0]
    loaded = load_router(tmp_path / "router")
    assert loaded.settings.gate == "soft"
    assert torch.equal(routed(loaded, ids, states).gate, routed(router, ids, states).gate)


def test_router_file_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    save_router(fitted("all+tokens", sentences(), features()), tmp_path / "router")
    rewrite(tmp_path / "router" / "router.safetensors", lambda s: {k: v for k, v in s.items() if k != "ngrams.share"})
    with pytest.raises(ArtifactError, match=r"router\.safetensors lacks 'ngrams\.share'; the twin must be built again"):
        load_router(tmp_path / "router")


def test_order_of_experts_does_not_matter() -> None:
    turned = dict(reversed(sentences().items()))
    first, second = (fitted("tokens", rows) for rows in (sentences(), turned))
    ids = stacked(sentences(seed=9))[0]
    assert torch.equal(routed(first, ids).gate, routed(second, ids).gate)


def test_ids_of_a_batch() -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 0], [7, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert token_ids(inputs).tolist() == [[5, 6, PADDING], [7, PADDING, PADDING]]
    assert token_ids({"input_ids": torch.tensor([[5, 6]])}).tolist() == [[5, 6]]
    assert stack_ids([torch.tensor([1]), torch.tensor([2, 3])]).tolist() == [[1, PADDING], [2, 3]]


def test_input_without_tokens_is_refused() -> None:
    with pytest.raises(GateError, match="needs input_ids, found pixel_values"):
        token_ids({"pixel_values": torch.zeros(1, 3, 2, 2)})


def test_router_data_without_common_tokens_is_refused() -> None:
    ids = {name: (1000 * i + torch.arange(40)).view(10, 4) for i, name in enumerate(EXPERTS)}
    with pytest.raises(DataError, match="no token occurs in two inputs"):
        fitted("tokens", ids)


def test_very_many_ngrams_are_cut_to_the_most_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinmerge.routing.tokens._MOST_NGRAMS", 20)
    made = head()
    assert len(made.keys) == 20
    assert bool((made.keys[1:] > made.keys[:-1]).all())
