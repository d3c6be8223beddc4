"""A model that no call changes: threads from a cold start, copies, pickles, and the router's own precision."""

import copy
import pickle
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.tiny import random_gate
from twinmerge.hf.batches import BatchLimits
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.predict import predict

pytestmark = pytest.mark.no_cover  # what these run is covered elsewhere, and tracing doubles their time


Twins = Callable[..., Path]
THREADS, CALLS = 8, 250
ROWS = [row for expert in tiny.EXPERTS for row in tiny.text_rows(expert, 6)]


def batch(length: int, side: str = "right") -> dict[str, Tensor]:
    words = [" ".join(f"w{5 + (7 * row + place) % 50}" for place in range(length - row % 2)) for row in range(3)]
    return dict(tiny.tokenizer(side)(words, return_tensors="pt", padding=True))


def calls_of(model: TwinModel, generates: bool) -> list[Callable[[], Any]]:
    """Calls of every kind, under different gates, modes and lengths; each gives tensors or values to compare."""
    gates = [random_gate(3, seed=seed) for seed in range(3)]
    gates += [torch.eye(3), random_gate(1, seed=5).expand(3, -1), torch.zeros(3, 3), torch.eye(3)[[1, 1, 1]]]
    found: list[Callable[[], Any]] = []
    for gate in gates:
        for mode in ("auto", "factors", "all", "gather", "merge"):
            for length in (2, 5, 9):
                x = batch(length)
                found.append(lambda x=x, gate=gate, mode=mode: model.encode(gate, mode=mode, **x)[0])
    for x in (batch(3), batch(6)):
        found.append(lambda x=x: model.route(**x))
        found.append(lambda x=x: model.encode(None, **x)[0])
        found.append(lambda x=x: model(**x).gate)
    if generates:
        for gate in gates[:4]:
            written = {**batch(4, "left"), "max_new_tokens": 3, "pad_token_id": 0, "do_sample": False}
            found.append(lambda x=written, gate=gate: model.generate(gate=gate, **x))
    for rows in (ROWS[:5], ROWS[4:11]):
        found.append(lambda rows=rows: list(predict(model, rows, max_new_tokens=2, limits=BatchLimits(rows=3))))
        found.append(lambda rows=rows: list(predict(model, rows, max_new_tokens=2, expert="sms")))
    return found


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_eight_threads_from_a_cold_start_get_what_one_gets_to_the_bit(twin: Twins, name: str) -> None:
    folder = twin(name)
    serial = [call() for call in calls_of(TwinModel.from_pretrained(folder), name == "gpt2")]
    calls = calls_of(TwinModel.from_pretrained(folder), name == "gpt2")
    wrong: list[Any] = []
    barrier = threading.Barrier(THREADS)

    def work(seed: int) -> None:
        order = random.Random(seed)
        barrier.wait()
        for _ in range(CALLS // (1 if name == "bert" else 5)):
            index = order.randrange(len(calls))
            try:
                if not same(calls[index](), serial[index]):
                    wrong.append(index)
            except RuntimeError as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_copy_answers_as_the_model_does_and_stands_on_its_own(twin: Twins, name: str, copied: Any) -> None:
    model, x, gate = TwinModel.from_pretrained(twin(name)), batch(5), random_gate(3)
    wanted, routed = model.encode(gate, **x)[0], model.route(**x)  # hooks are there, and merged weights
    model.encode(gate[:1].expand(3, -1), mode="merge", **x)
    found = copied(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(found.encode(gate, **x)[0], wanted)
    assert torch.equal(found.route(**x), routed)
    assert found.expert_names == model.expert_names
    assert found.paths() == model.paths()
    assert list(predict(found, ROWS[:2], max_new_tokens=2))


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_router_stays_in_float32_whatever_the_weights_become(twin: Twins, change: Callable[[Any], Any]) -> None:
    model = TwinModel.from_pretrained(twin("bert"))
    before = {name: value.clone() for name, value in model.router.state_dict().items()}
    changed = change(model)
    assert changed is model
    assert next(model.backbone.parameters()).dtype != torch.float32
    for name, value in model.router.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert model.to("meta").router.state_dict()[name].device.type == "meta"
