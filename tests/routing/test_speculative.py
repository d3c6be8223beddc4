"""Routers that guess by tokens and look at the pass under their guess: what they learn from, and what they ask for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.routing.test_tokens import EXPERTS, sentences, stacked
from twinmerge.errors import RecipeError
from twinmerge.files.schema import load_yaml
from twinmerge.routing import fit as module
from twinmerge.routing.fit import fit_router
from twinmerge.routing.router import Batch, Router
from twinmerge.routing.store import load_router, save_router
from twinmerge.twin.features import Layers
from twinmerge.twin.recipe import RouterSettings

SETTINGS = RouterSettings(features="speculative", gate="hard")


class Twin(Batch):
    """Inputs whose hidden states tell their expert, and under a wrong gate, that it is wrong."""

    def __init__(self, ids: Tensor, labels: Tensor, noise: float = 1.0, passes: list[Tensor] | None = None) -> None:
        self._ids, self.labels, self.noise = ids, labels, noise
        self.passes: list[Tensor] = [] if passes is None else passes

    @property
    def ids(self) -> Tensor:
        return self._ids

    def hidden(self, layers: Layers, gate: Tensor | None = None) -> Tensor:
        assert layers == Layers("all")
        assert gate is not None
        self.passes.append(gate)
        kind = nn.functional.one_hot(self.labels, 3).float()
        states = torch.cat([2 * kind, 3 * gate, (kind * gate).sum(dim=1, keepdim=True) * 2], dim=1)
        generator = torch.Generator().manual_seed(int(self.labels.sum()))
        return states + self.noise * torch.randn(states.shape, generator=generator)

    def take(self, rows: Tensor) -> "Twin":
        return Twin(self._ids[rows], self.labels[rows], self.noise, self.passes)


def inputs(seed: int = 0, rows: int = 80, own: float = 0.15, noise: float = 1.0) -> Twin:
    return Twin(*stacked(sentences(rows=rows, own=own, seed=seed)), noise)


def fitted(batch: Twin, settings: RouterSettings = SETTINGS) -> Router:
    return fit_router(batch, [EXPERTS[label] for label in batch.labels.tolist()], settings, seed=0)


def right(router: Router, batch: Twin) -> Tensor:
    return router.route(batch).expert == batch.labels


def test_guess_is_checked_by_the_pass_under_it() -> None:
    router, asked = fitted(inputs()), inputs(seed=9)
    guessed = router.scorer.tokens.score(asked)[0].argmax(dim=1)
    found = router.route(asked)
    (gate,) = asked.passes  # one pass, under the guesses
    assert torch.equal(gate, nn.functional.one_hot(guessed, 3).float())
    tokens_right = float((guessed == asked.labels).float().mean())
    assert float((found.expert == asked.labels).float().mean()) > tokens_right + 0.05
    assert torch.equal(found.gate, nn.functional.one_hot(found.expert, 3) * ~found.fallback[:, None])
    again = float((found.fallback | (found.expert != guessed)).float().mean())
    assert router.report["second_look"] == pytest.approx(again, abs=0.12)
    assert router.report["accuracy"] == pytest.approx(float(right(router, asked).float().mean()), abs=0.1)


def test_rows_are_learned_from_under_guesses_of_heads_that_have_not_seen_them() -> None:
    """Of random tokens, such guesses are right for one row in three; those of the head itself for nearly all."""
    batch = inputs(own=0.0, rows=100)
    router = fitted(batch)
    (gates,) = batch.passes
    rows, learnt = len(batch.labels), 240
    extra = len(gates) - rows
    assert extra == round(module._WRONG_SHARE * learnt)
    order = torch.cat([torch.arange(learnt), torch.arange(learnt + extra, len(gates))])
    # the rows in the order of the fit: learnt, held out, expert by expert
    labels = torch.cat([torch.arange(3).repeat_interleave(80), torch.arange(3).repeat_interleave(20)])
    out_of_fold = float((gates[order].argmax(dim=1) == labels).float().mean())
    seen = float((router.scorer.tokens.score(batch)[0].argmax(dim=1) == batch.labels).float().mean())
    assert out_of_fold == pytest.approx(1 / 3, abs=0.12)
    assert seen > 0.8
    assert router.report["second_look"] > 0.4


def test_some_rows_are_looked_at_under_a_wrong_gate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[Tensor] = []
    fit = module.assemble

    def watched(*given: object, **more: object) -> Router:
        router = fit(*given, **more)
        learn = router.scorer.hidden.fit

        def fit_hidden(training: object, *rest: object) -> None:
            weights.append(training.weights)
            learn(training, *rest)

        router.scorer.hidden.fit = fit_hidden
        return router

    monkeypatch.setattr(module, "assemble", watched)
    batch = inputs()
    fitted(batch)
    (given,), (gates,) = weights, batch.passes
    extra = (given < 0.5).nonzero()[:, 0]
    assert len(extra) == round(0.2 * 192)
    assert torch.allclose(given[extra], torch.tensor(0.2))
    assert len(gates) == 240 + len(extra)


def test_speculative_router_is_saved_to_the_bit(tmp_path: Path) -> None:
    router = fitted(inputs())
    save_router(router, tmp_path / "router")
    loaded = load_router(tmp_path / "router")
    first, second = (one.route(inputs(seed=9)) for one in (router, loaded))
    assert torch.equal(first.probability, second.probability)
    assert torch.equal(first.gate, second.gate)
    assert (loaded.report, loaded.settings) == (router.report, router.settings)


def test_input_unlike_all_others_falls_back_whatever_its_guess() -> None:
    router, asked = fitted(inputs()), inputs(seed=9)

    class Far(Twin):
        def hidden(self, layers: Layers, gate: Tensor | None = None) -> Tensor:
            return super().hidden(layers, gate) + 100

    routing = router.route(Far(asked.ids, asked.labels))
    assert routing.fallback.all()
    assert not routing.gate.any()


@pytest.mark.parametrize("held_out", [0.01, 0.99])
def test_two_inputs_of_each_expert_are_enough(held_out: float) -> None:
    ids = torch.tensor([[1, 7], [1, 8], [2, 7], [2, 8], [3, 7], [3, 8]])
    settings = RouterSettings(features="speculative", gate="hard", held_out=held_out)
    router = fitted(Twin(ids, torch.arange(3).repeat_interleave(2)), settings)
    assert router.route(inputs()).probability.isfinite().all()


def test_speculative_needs_a_hard_gate(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("features: speculative\ngate: soft\n")
    with pytest.raises(RecipeError, match="pass under one expert: gate must be hard, found soft"):
        load_yaml(path, RouterSettings)
