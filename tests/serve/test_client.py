"""chat, classify and route from the command line, at a server and at a folder."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.serve.running import TEMPLATE, Running, running
from twinmerge.cli import main
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.predict import predict


@pytest.fixture(scope="module")
def server(twin: Callable[..., Path]) -> Iterator[Running]:
    model = TwinModel.from_pretrained(twin("llama"))
    model.tokenizer.chat_template = TEMPLATE
    with running(model, api_key="key", max_new_tokens=5) as found:
        yield found


def test_chat_streams_an_answer_and_says_who_gave_it(
    server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINMERGE_API_KEY", "key")
    assert main(["chat", server.url, "w6 w7", "--system", "w5", "--max-tokens", "4", "--model", "tiny:sms"]) == 0
    printed = capsys.readouterr()
    (wanted,) = predict(server.engine.model, [{"text": "w5 w6 w7"}], expert="sms", max_new_tokens=4)
    assert printed.out == wanted["continuation"] + "\n"
    assert printed.err == "sms: sms 1.00\n"


def test_chat_reads_lines_and_remembers(
    server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w6\nw7\n"))
    assert main(["chat", f"{server.url}/v1", "--api-key", "key", "--gate", "sms=0.5,ag=0.5"]) == 0
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    gate = {"ag": 0.5, "sms": 0.5}
    (wanted,) = predict(server.engine.model, [{"text": f"w6 {first} w7"}], gate=gate, max_new_tokens=5)
    assert second == wanted["continuation"]
    assert printed.err == "ag: ag 0.50, sms 0.50\n" * 2


def test_route_says_where_texts_go(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [tiny.text_rows(name, 2)[1]["text"] for name in tiny.EXPERTS]
    assert main(["route", server.url, *texts, "--api-key", "key", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["expert"] for one in found] == list(tiny.EXPERTS)
    assert main(["route", server.url, texts[0], "--api-key", "key"]) == 0
    assert capsys.readouterr().out.startswith("trec (")


def test_a_folder_is_served_while_it_is_asked(twin: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, row = twin("bert"), tiny.text_rows("sms", 2)[1]
    assert main(["classify", str(folder), row["text"], "--json"]) == 0
    printed = capsys.readouterr()
    (wanted,) = predict(TwinModel.from_pretrained(folder), [row])
    assert json.loads(printed.out)["label"] == wanted["label"]
    assert printed.err == ""
    assert main(["classify", str(folder), row["text"], "--model", f"{folder.name}:sms"]) == 0
    assert "; sms: sms 1.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("no/such", 2, "no/such must be a twin's folder, or the address of a server"),
        ("http://127.0.0.1:9", 1, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_is_no_twin_is_refused(target: str, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", target, "w5"]) == code
    assert words in capsys.readouterr().err


def test_refusals_of_the_server_are_said(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", server.url, "w5"]) == 2
    assert "the API key is missing or wrong" in capsys.readouterr().err
    assert main(["classify", server.url, "w5", "--api-key", "key"]) == 2
    assert "tiny writes texts" in capsys.readouterr().err
