"""Labels and embeddings over HTTP: those of predict, whatever shares a batch; images as data URIs alone."""

import base64
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import transformers

from tests import tiny
from tests.serve.running import Running, running
from tests.tiny import GATE_ORDER
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build
from twinmerge.jobs.predict import predict


@pytest.fixture(scope="module")
def server(twin: Callable[..., Path]) -> Iterator[Running]:
    with running(TwinModel.from_pretrained(twin("bert"), dtype=torch.float64), wait_ms=20) as found:
        yield found


def same(answer: dict[str, object], wanted: dict[str, object]) -> bool:
    """Equal but for the last digit of what was rounded."""
    return answer.keys() == wanted.keys() and all(
        value == pytest.approx(wanted[key], abs=2e-6) if isinstance(value, float) else value == wanted[key]
        for key, value in answer.items()
        if key not in ("gate", "second")
    )


def test_mixed_requests_at_once_are_answered_as_predict_does(server: Running) -> None:
    model = server.engine.model
    gate = {"ag": 0.25, "sms": 0.75}
    ways = [({}, {}), ({"twin": {"gate": gate}}, {"gate": gate}), ({"model": "tiny:trec"}, {"expert": "trec"})]
    rows = [row for name in tiny.EXPERTS for row in tiny.text_rows(name, 8)]
    asked = [({"model": "tiny", "input": row["text"], **body}, row, more) for row in rows for body, more in ways]
    before = server.counted("twinmerge_batch_rows_count")
    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(lambda one: server.ask("/classify", one[0]), asked))
    for (_, row, more), (status, answer) in zip(asked, found, strict=True):
        (wanted,) = predict(model, [row], **more)
        (data,) = answer["data"]
        assert status == 200
        assert same(data, {"index": 0, **{key: value for key, value in wanted.items() if key != "text"}})
        assert data["gate"] == pytest.approx(wanted["gate"], abs=2e-6)
    assert server.counted("twinmerge_batch_rows_count") - before < len(asked) / 3  # they shared batches


def test_many_inputs_of_one_request_and_pairs(server: Running) -> None:
    status, found = server.ask("/classify", {"model": "tiny", "input": ["w5", "w6 w7"], "text_pair": ["w8", "w9"]})
    wanted = predict(server.engine.model, [{"text": "w5", "text_pair": "w8"}, {"text": "w6 w7", "text_pair": "w9"}])
    assert status == 200
    assert [one["label"] for one in found["data"]] == [one["label"] for one in wanted]
    assert found["usage"]["prompt_tokens"] == 5
    status, message = server.refused("/classify", {"model": "tiny", "input": ["w5", "w6"], "text_pair": "w8"})
    assert (status, message) == (400, "text_pair must hold one text an input, found 1 for 2")


def test_the_shared_expert_answers_by_the_head_that_is_named(server: Running) -> None:
    status, found = server.ask("/classify", {"model": "tiny:shared", "input": "w5", "twin": {"expert": "sms"}})
    (wanted,) = predict(server.engine.model, [{"text": "w5"}], expert="sms", gate={"sms": 0.0})
    assert status == 200
    assert found["data"][0]["score"] == pytest.approx(wanted["score"], abs=2e-6)
    assert "tiny:shared" not in [one["id"] for one in server.ask("/v1/models")[1]["data"]]
    status, message = server.refused("/classify", {"model": "tiny:shared", "input": "w5"})
    assert (status, message) == (400, "the shared expert has no head; say whose answers: twin.expert")


def test_routes_say_where_inputs_go(server: Running) -> None:
    rows = [row for name in GATE_ORDER for row in tiny.text_rows(name, 3)]
    status, found = server.ask("/v1/route", {"model": "tiny", "input": [row["text"] for row in rows]})
    assert status == 200
    for said, wanted in zip(found["data"], predict(server.engine.model, rows), strict=True):
        assert said["expert"] == wanted["expert"]
        assert said["gate"] == pytest.approx(wanted["gate"], abs=2e-6)
        assert said["confidence"] == pytest.approx(wanted["confidence"], abs=2e-6)
    status, message = server.refused("/v1/route", {"model": "tiny:sms", "input": "w5"})
    assert (status, message) == (400, "only tiny is routed, without twin")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/v1/chat/completions"])
def test_classifiers_refuse_what_they_do_not_do(server: Running, path: str) -> None:
    own = {"/v1/embeddings": {"input": "w5"}, "/v1/completions": {"prompt": "w5"}}
    body = {"model": "tiny", **own.get(path, {"messages": [{"role": "user", "content": "w5"}]})}
    status, message = server.refused(path, body)
    assert (status, "ask /classify" in message) == (400, True)


def test_a_bad_input_fails_alone(server: Running) -> None:
    good, bad = {"model": "tiny", "input": "w5"}, {"model": "tiny", "input": ["w5", 7]}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda body: server.ask("/classify", body)[0], [good, bad] * 4))
    assert found == [200, 400] * 4


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("embedding")
    family = tiny.make_family(root, tiny.bert(), transformers.BertModel)
    folder = build(family.recipe(exclusive={"rank": 4}), root / "twin").path
    with running(TwinModel.from_pretrained(folder)) as found:
        yield found


def test_embeddings_are_those_of_predict_and_the_client_reads_both_forms(embedding: Running) -> None:
    client = openai.OpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0)
    texts = ["w5 w6 w7", "w30", "w50 w51"]
    wanted = list(predict(embedding.engine.model, [{"text": text} for text in texts]))
    for form in ("float", "base64"):
        found = client.embeddings.create(model="tiny", input=texts, encoding_format=form)
        for one, row in zip(found.data, wanted, strict=True):
            values = one.embedding
            if isinstance(values, str):
                raw = base64.b64decode(values)
                values = list(struct.unpack(f"<{len(raw) // 4}f", raw))
            assert values == pytest.approx(row["embedding"], abs=1e-5)
            assert one.twin["expert"] == row["expert"]
        assert found.usage.prompt_tokens == 6
    assert client.embeddings.create(model="tiny", input="w5").data[0].embedding  # base64 is its default
    status, message = embedding.refused("/v1/embeddings", {"model": "tiny", "input": "w5", "dimensions": 3})
    assert (status, "dimensions: Extra inputs are not permitted" in message) == (400, True)
    assert "ask /v1/embeddings" in embedding.refused("/classify", {"model": "tiny", "input": "w5"})[1]
