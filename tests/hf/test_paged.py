"""Texts under gates of their own in one continuous batch: each as its own materialised model would write it."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.tiny import random_gate
from twinmerge.errors import GateError, MismatchError
from twinmerge.hf import paged
from twinmerge.hf.model import TwinModel
from twinmerge.hf.paged import PagedWriter, Token, Wish

Twins = Callable[..., Path]
TEXTS, NEW = 16, 5


def prompts() -> list[list[int]]:
    """Of different lengths; the last two are the same."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(5, 60, (2 + i,), generator=generator).tolist() for i in range(TEXTS - 1)]
    return [*made, made[-1]]


def written(
    writer: PagedWriter, gates: Tensor, wishes: Sequence[Wish], texts: Sequence[list[int]]
) -> list[list[Token]]:
    """All at once."""

    async def one(prompt: list[int], gate: Tensor, wish: Wish) -> list[Token]:
        return [token async for token in writer.write(prompt, gate, None, wish)]

    async def every() -> list[list[Token]]:
        return await asyncio.gather(*map(one, texts, gates, wishes))

    writer.start()
    try:
        return asyncio.run(every())
    finally:
        writer.stop()


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


FORMS = {
    "llama": {},
    "gpt2": {},
    "llama with one head for all": {"exclusive": {"rank": 4, "embeddings": "shared"}},
    "llama of sparse parts": {"exclusive": {"compression": "magnitude", "density": 0.3, "embeddings": "exclusive"}},
}


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, twin: Twins) -> TwinModel:
    return TwinModel.from_pretrained(twin(request.param.split()[0], **FORMS[request.param]), dtype=torch.float64)


def alone(model: TwinModel, prompt: list[int], gate: Tensor, **settings: Any) -> list[int]:
    x = torch.tensor([prompt])
    found = model.materialize(gate).generate(x, max_new_tokens=NEW, pad_token_id=0, do_sample=False, **settings)
    return found[0, len(prompt) :].tolist()


def test_sixteen_texts_under_sixteen_gates_are_those_of_sixteen_models(model: TwinModel) -> None:
    gates = random_gate(TEXTS, dtype=torch.float64)
    gates[3], gates[4], gates[-1] = 0.0, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([3.0, 2.0, 4.0])
    writer = PagedWriter(model, batch_tokens=24, cache_tokens=1024, texts=TEXTS)  # long prompts take several passes
    found = written(writer, gates, [Wish(NEW)] * TEXTS, prompts())
    assert [ids(tokens) for tokens in found] == [alone(model, p, g) for p, g in zip(prompts(), gates, strict=True)]
    assert found[-1] != found[-2]  # one prompt, two gates
    assert not writer._texts
    assert not writer._manager.output_router.result_handlers


def test_one_gate_for_all_and_the_shared_expert_alone(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    for gate in (torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)):
        writer = PagedWriter(model, batch_tokens=64, cache_tokens=1024, texts=4)
        found = written(writer, gate.expand(4, -1), [Wish(NEW)] * 4, prompts()[-4:])
        assert [ids(tokens) for tokens in found] == [alone(model, p, gate) for p in prompts()[-4:]]


def test_a_cache_too_small_for_all_texts_loses_none(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    gates, texts = random_gate(8, dtype=torch.float64), prompts()[-8:]
    writer = PagedWriter(model, batch_tokens=64, cache_tokens=3 * paged.PAGE, texts=8)
    found = written(writer, gates, [Wish(NEW)] * 8, texts)
    assert [ids(tokens) for tokens in found] == [alone(model, p, g) for p, g in zip(texts, gates, strict=True)]


def test_a_seed_gives_the_same_text_whatever_shares_the_batch(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    gate = random_gate(1, dtype=torch.float64)
    wishes = [Wish(NEW, temperature=1.3, top_p=0.9, seed=seed) for seed in (7, 8, 7, None)]
    together = written(
        PagedWriter(model, batch_tokens=64, cache_tokens=512, texts=4), gate.expand(4, -1), wishes, [prompts()[4]] * 4
    )
    single = written(PagedWriter(model, batch_tokens=64, cache_tokens=512, texts=4), gate, wishes[:1], [prompts()[4]])
    assert together[0] == together[2] == single[0]
    assert together[0] != together[1]


def test_probabilities_are_the_models_own(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    gate, prompt = random_gate(1, dtype=torch.float64), prompts()[5]
    writer = PagedWriter(model, batch_tokens=64, cache_tokens=512, texts=4)
    (tokens,) = written(writer, gate, [Wish(NEW, temperature=0.8, seed=1, top=3)], [prompt])
    plain = model.materialize(gate[0])
    with torch.no_grad():
        logits = plain(torch.tensor([prompt + ids(tokens)])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)  # told in float32
        values, best = row.topk(3)
        assert [one for one, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_an_experts_own_rules_of_writing_hold(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    model.backbone.generation_config.repetition_penalty = 1.7
    gates = random_gate(2, dtype=torch.float64)
    writer = PagedWriter(model, batch_tokens=64, cache_tokens=512, texts=4)
    found = written(writer, gates, [Wish(NEW)] * 2, prompts()[:2])
    expected = [alone(model, p, g, repetition_penalty=1.7) for p, g in zip(prompts(), gates, strict=False)]
    assert [ids(tokens) for tokens in found] == expected


def test_a_gate_under_which_there_are_no_numbers_fails_and_the_next_text_is_right(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    gates, prompt = torch.tensor([[0.2, 0.3, 0.5], [1e300, 1e300, 1e300]], dtype=torch.float64), prompts()[3]
    writer = PagedWriter(model, batch_tokens=64, cache_tokens=64, texts=4)

    async def one(gate: Tensor, temperature: float) -> list[Token]:
        return [token async for token in writer.write(prompt, gate, None, Wish(NEW, temperature))]

    async def three() -> list[Token]:
        for temperature in (0.0, 1.0):
            with pytest.raises(GateError, match="under this gate the model gives no numbers; give smaller weights"):
                await one(gates[1], temperature)
        return await one(gates[0], 0.0)

    writer.start()
    try:
        assert ids(asyncio.run(three())) == alone(model, prompt, gates[0])
    finally:
        writer.stop()


def test_leaving_a_text_ends_the_work_on_it(twin: Twins) -> None:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    writer = PagedWriter(model, batch_tokens=64, cache_tokens=4096, texts=4)
    gate = random_gate(1, dtype=torch.float64)[0]

    async def leave() -> int:
        text = writer.write([5, 6], gate, None, Wish(2000))
        async for _ in text:
            break
        await text.aclose()
        for _ in range(200):
            processor = writer._manager.batch_processor
            if not processor.has_pending_requests():
                break
            await asyncio.sleep(0.02)
        return len(processor.scheduler.active_requests)

    writer.start()
    try:
        assert asyncio.run(leave()) == 0
    finally:
        writer.stop()


def test_what_cannot_be_served_is_refused(twin: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwinModel.from_pretrained(twin("llama"))
    model.twin.fallback.names = ("model.norm.weight",)
    with pytest.raises(MismatchError, match=r"1 parameters, first 'model.norm.weight', need a pass for every"):
        PagedWriter(model, batch_tokens=64, cache_tokens=512, texts=4)
    with pytest.raises(MismatchError, match="a BertModel does not keep keys and values"):
        PagedWriter(TwinModel.from_pretrained(twin("bert")), batch_tokens=64, cache_tokens=512, texts=4)
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.raises(MismatchError, match=r"transformers 5.23.x, .* found 5.99.0"):
        PagedWriter(model, batch_tokens=64, cache_tokens=512, texts=4)
