"""Chats and completions: OpenAI's own client, unchanged, and texts that are those of materialised models."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests import tiny
from tests.serve.running import TEMPLATE, Running, running
from tests.tiny import GATE_ORDER, random_gate
from twinmerge.hf.model import TwinModel
from twinmerge.hf.paged import Token
from twinmerge.jobs.predict import predict
from twinmerge.serve.texts import Reader

NEW = 6


@pytest.fixture(scope="module")
def server(twin: Callable[..., Path]) -> Iterator[Running]:
    model = TwinModel.from_pretrained(twin("llama"), dtype=torch.float64)
    model.tokenizer.chat_template = TEMPLATE
    with running(model) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "w5 w6 w7", "max_tokens": NEW, "temperature": 0, **more}


def chat(**more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "w5"}, {"role": "user", "content": [{"type": "text", "text": "w6 w7"}]}]
    return {"model": "tiny", "messages": messages, "max_completion_tokens": NEW, "temperature": 0, **more}


def test_models_are_the_routed_one_the_shared_expert_and_each_expert(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny", "tiny:shared", *(f"tiny:{e}" for e in GATE_ORDER)]


def test_routed_answers_are_those_of_predict(server: Running, client: openai.OpenAI) -> None:
    rows = [row for name in tiny.EXPERTS for row in tiny.text_rows(name, 4)]
    expected = list(predict(server.engine.model, rows, max_new_tokens=NEW))
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda row: client.completions.create(**completion(prompt=row["text"])), rows))
    for answer, wanted in zip(found, expected, strict=True):
        assert answer.choices[0].text == wanted["continuation"]
        assert answer.choices[0].finish_reason == wanted["stop_reason"]
        assert answer.twin == {key: wanted[key] for key in ("expert", "gate", "fallback", "confidence", "second")}
    assert server.counted("twinmerge_batch_rows_sum") >= 12
    assert server.counted("twinmerge_gate_mass_total") >= 11


def test_sixteen_gates_in_one_batch_give_the_texts_of_sixteen_models(server: Running, client: openai.OpenAI) -> None:
    model, gates = server.engine.model, random_gate(16, seed=5).double() * torch.linspace(0.5, 3, 16)[:, None]
    named = [dict(zip(GATE_ORDER, gate, strict=True)) for gate in gates.tolist()]
    bodies = [
        completion(prompt=f"w{5 + i} w6 w{40 - i}", extra_body={"twin": {"gate": gate}}) for i, gate in enumerate(named)
    ]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda body: client.completions.create(**body), bodies))
    for body, gate, answer in zip(bodies, gates, found, strict=True):
        x = model.tokenizer(body["prompt"], return_tensors="pt")["input_ids"]
        ids = model.materialize(gate.float()).generate(x, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert answer.choices[0].text == model.tokenizer.decode(ids[0, x.shape[1] :], skip_special_tokens=True)
        assert answer.twin["gate"] == pytest.approx(body["extra_body"]["twin"]["gate"], abs=1e-6)


def test_an_expert_and_the_shared_expert_by_name(server: Running, client: openai.OpenAI) -> None:
    for name, expert in (("tiny:sms", "sms"), ("tiny:shared", None)):
        answer = client.completions.create(**completion(model=name))
        gate = {one: float(one == expert) for one in GATE_ORDER}
        wanted = {"expert": expert or GATE_ORDER[0]} if expert else {"gate": {GATE_ORDER[0]: 0.0}}
        (row,) = predict(server.engine.model, [{"text": "w5 w6 w7"}], max_new_tokens=NEW, **wanted)
        assert answer.choices[0].text == row["continuation"]
        assert answer.twin == {"expert": expert, "gate": gate, "fallback": False, "confidence": None}


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**chat(logprobs=True, top_logprobs=2))
    chunks = list(
        client.chat.completions.create(
            **chat(logprobs=True, top_logprobs=2), stream=True, stream_options={"include_usage": True}
        )
    )
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage
    assert whole.usage.prompt_tokens == 3
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    told = [one for part in parts if part.choices[0].logprobs for one in part.choices[0].logprobs.content]
    assert [one.token for one in told] == [one.token for one in whole.choices[0].logprobs.content]
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == pytest.approx(one.logprob) for one in told)
    assert parts[0].twin == whole.twin


def test_stop_ends_a_text_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(**completion()).choices[0].text
    stop = whole.split()[2]
    for stream in (False, True):
        answer = client.completions.create(**completion(stop=[stop, "never"]), stream=stream)
        choices = [part.choices[0] for part in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_several_texts_of_several_prompts_and_seeds(client: openai.OpenAI) -> None:
    asked = completion(prompt=["w5 w6", "w30"], n=2, temperature=1.5, top_p=0.9, seed=3)
    first, second = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts[:2])) == 2
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert first.usage.prompt_tokens == 3
    assert len(first.twin) == 2
    alone = client.completions.create(**completion(prompt="w30", temperature=1.5, top_p=0.9, seed=4))
    assert alone.choices[0].text == texts[3]  # the second of a prompt has the next seed


def test_fields_that_ask_for_nothing_are_taken_and_logprobs_of_completions(client: openai.OpenAI) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "echo": False, "best_of": 1, "user": "me"}
    answer = client.completions.create(**completion(logprobs=2), **neutral)
    told = answer.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == answer.usage.completion_tokens
    assert all(len(top) == 2 for top in told.top_logprobs)


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("completions", {"presence_penalty": 0.5}, "presence_penalty cannot be honoured here"),
        ("completions", {"tools": [{}]}, "tools cannot be honoured here"),
        ("completions", {"beams": 3}, "beams: Extra inputs are not permitted; this route knows model, twin, stream"),
        ("completions", {"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ("completions", {"temperature": 1e-40}, "temperature: must be 0, which takes the likeliest token, or 0.01"),
        ("completions", {"twin": {"gate": {"sms": 1e30}}}, "twin.gate.sms: Input should be less than or equal to 100"),
        ("completions", {"temperature": "hot"}, "temperature: Input should be a valid number"),
        ("completions", {"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ("completions", {"max_tokens": 5000}, "max_tokens must be 4096 at most on this server, found 5000"),
        ("completions", {"max_tokens": 40}, "a prompt of 3 tokens or more and 40 new ones is too long: there is room"),
        ("completions", {"prompt": "w5 " * 100}, "a prompt of 32 tokens or more and 6 new ones is too long"),
        ("completions", {"prompt": [5, 6]}, "prompt: Input should be a valid string"),
        ("completions", {"prompt": "\ud800"}, "prompt: must be text; half of a surrogate pair is none"),
        ("completions", {"model": "tiny:none"}, "there is no model 'tiny:none'; known are tiny, tiny:shared"),
        ("completions", {"model": "other"}, "there is no model 'other'"),
        ("completions", {"twin": {"gate": {"none": 1.0}}}, "unknown expert 'none'; this twin has ag, sms, trec"),
        ("completions", {"twin": {"expert": "none"}}, "unknown expert 'none'"),
        ("completions", {"twin": {"gates": {}}}, "twin.gates: Extra inputs are not permitted"),
        ("completions", {"model": "tiny:sms", "twin": {"gate": {}}}, "tiny:sms says who answers already"),
        ("completions", {"stream_options": {}}, "stream_options are of streams"),
        ("chat/completions", {"messages": []}, "messages: List should have at least 1 item"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "w5"}]}, "the last message must not be"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "a"}]}]},
            "messages.0.content",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    server: Running, path: str, change: dict[str, Any], words: str
) -> None:
    body = {**(chat() if path.startswith("chat") else completion()), **change}
    status, message = server.refused(f"/v1/{path}", body)
    assert status == (404 if "model" in change and "no model" in words else 400)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_gate_of_no_numbers_is_refused(server: Running, number: str) -> None:
    body = json.dumps(completion(twin={"gate": {"sms": 0.5}})).replace("0.5", number)
    status, message = server.refused("/v1/completions", body.encode())
    assert status == 400
    assert "the body must be JSON" in message


def test_texts_ask_other_routes_in_vain(server: Running) -> None:
    for path in ("/classify", "/v1/embeddings"):
        status, message = server.refused(path, {"model": "tiny", "input": "w5"})
        assert (status, "writes texts" in message) == (400, True)
    status, found = server.ask("/v1/route", {"model": "tiny", "input": ["w5 w6", "w30"]})
    assert status == 200
    assert [set(one) for one in found["data"]] == [{"index", "expert", "gate", "fallback", "confidence", "second"}] * 2


def test_letters_of_several_tokens_and_stops_across_tokens_are_held_back() -> None:
    words = {0: b"a", 1: b"\xc3", 2: b"\xa4", 3: b" be", 4: b"fore", 9: b"", 5: b"\xe2\x82"}

    def decode(ids: Any) -> str:
        return b"".join(words[one] for one in ids).decode(errors="replace")

    def read(ids: list[int], **settings: Any) -> list[str]:
        reader = Reader(decode, **{"ends": {9}, "stops": (), "limit": 99, **settings})
        return [reader.read(Token(one)).text for one in ids]

    assert read([0, 1, 2, 3, 4, 9]) == ["a", "", "ä", " be", "fore", ""]
    assert read([0, 3, 4], stops=(" before",)) == ["a", "", ""]
    assert read([0, 3, 0], stops=(" before",)) == ["a", "", " bea"]
    assert read([0, 5], limit=2) == ["a", "\N{REPLACEMENT CHARACTER}"]
