"""What goes wrong at a server, one by one; others keep being answered. Everything talks to 127.0.0.1 alone."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import tiny
from tests.jobs import test_images
from tests.serve.running import Running, post, running, until
from twinmerge.cli import main
from twinmerge.hf.model import TwinModel
from twinmerge.jobs.build import build

LONG = 1500
"""Tokens of a text that takes long enough to be interrupted."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin of models that read long texts and never end one."""
    root = tmp_path_factory.mktemp("endless")
    config = tiny.text_config(transformers.LlamaConfig, num_key_value_heads=1, pad_token_id=0, bos_token_id=2)
    config.max_position_embeddings, config.eos_token_id = 4096, None
    family = tiny.make_family(root, tiny.seeded(transformers.LlamaForCausalLM, config), transformers.LlamaForCausalLM)
    for path in root.glob("*/tokenizer_config.json"):
        path.write_text(path.read_text().replace('"model_max_length": 32', '"model_max_length": 4096'))
    return build(family.recipe(exclusive={"rank": 2}), root / "twin", check=False).path


@pytest.fixture(scope="module")
def server(endless: Path) -> Iterator[Running]:
    with running(TwinModel.from_pretrained(endless), max_queue=4, api_key="kö", max_body_bytes=5000) as found:
        yield found


KEY = {"Authorization": "Bearer kö".encode().decode("latin-1")}


def long(**more: Any) -> dict[str, Any]:
    return {"model": "tiny:sms", "prompt": "w5 w6", "max_tokens": LONG, "temperature": 0, **more}


def answers(server: Running) -> bool:
    """Whether another request is answered."""
    return server.ask("/v1/completions", long(max_tokens=2), **KEY)[0] == 200


def with_key(wire: bytes) -> bytes:
    return wire.replace(b"Host", b"Authorization: Bearer k\xc3\xb6\r\nHost")


def begin(server: Running, **more: Any) -> socket.socket:
    """A stream whose first bytes have come."""
    wire = with_key(post("/v1/completions", long(stream=True, **more)))
    connection = server.connect()
    connection.sendall(wire)
    assert b"200 OK" in connection.recv(200)
    return connection


def idle(server: Running) -> bool:
    writer = server.engine.writer
    assert writer is not None
    return not writer._texts and not writer._manager.batch_processor.has_pending_requests()


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer k"}, {"Authorization": "Bearer"}])
def test_without_the_key_nothing_but_health_and_the_page_is_answered(server: Running, given: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/v1/none"):
        status, message = server.refused(path, None, **given)
        assert (status, message) == (401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
    assert server.refused("/v1/completions", long(), **given)[0] == 401
    assert server.ask("/health", **given) == (200, {"status": "ok"})
    assert server.ask("/", **given)[0] == 200
    assert server.ask("/v1/models", **given | KEY)[0] == 200


def test_a_client_that_goes_away_ends_the_work_on_its_text(server: Running) -> None:
    for stream in (True, False):
        if stream:
            connection = begin(server)
        else:
            connection = server.connect()
            connection.sendall(with_key(post("/v1/completions", long())))
            assert until(lambda: not idle(server))
        assert answers(server)
        connection.close()
        assert until(lambda: idle(server), 5)


def test_a_slow_reader_slows_nobody_else(server: Running) -> None:
    connection = begin(server, logprobs=5)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    time.sleep(0.3)
    began = time.monotonic()
    assert answers(server)
    assert time.monotonic() - began < 5
    connection.close()
    assert until(lambda: idle(server), 5)


def test_a_body_too_large_is_refused_before_it_is_read(server: Running) -> None:
    status, message = server.refused("/v1/completions", long(prompt="w5 " * 2000), **KEY)
    assert (status, message) == (413, "the body must hold 5,000 bytes at most")
    connection = server.connect()
    connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\xc3\xb6\r\n")
    connection.sendall(b"Content-Length: 50000000\r\n\r\n" + b" " * 6000)  # 50 MB are announced, 6 kB come
    assert b" 413 " in connection.recv(200)
    connection.close()
    assert answers(server)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" * 4000, "the body must be JSON: it is nested too deeply"),
        (b'{"model": "\xff\xfe"}', "the body must be JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"", "the body must be JSON: Expecting value"),
        (b"[1]", "the body must be a JSON object, found list"),
        (b'{"model": "a", "model": "b"}', "key 'model' stands twice"),
    ],
)
def test_what_is_no_json_is_refused(server: Running, raw: bytes, words: str) -> None:
    status, message = server.refused("/v1/chat/completions", raw, **KEY)
    assert status == 400
    assert words in message
    assert answers(server)


def test_unknown_paths_and_methods_are_refused_in_the_same_form(server: Running) -> None:
    assert server.refused("/v1/../../etc/passwd", None, **KEY)[0] == 404
    assert server.refused("/page.css/../../../pyproject.toml", None, **KEY)[0] == 404
    assert server.refused("/v1/completions", None, **KEY)[0] == 405


def test_a_full_queue_says_when_to_come_again(server: Running) -> None:
    held = [begin(server) for _ in range(4)]
    connection = server.connect()
    connection.sendall(with_key(post("/v1/completions", long())))
    said = ""
    while "}}" not in said:
        said += connection.recv(2000).decode().lower()
    assert " 429 " in said
    assert "retry-after: 1" in said
    assert "4 requests wait already" in said
    assert server.ask("/health")[0] == 200
    for one in (*held, connection):
        one.close()
    assert until(lambda: idle(server), 5)
    assert until(lambda: answers(server), 5)


def test_a_request_that_takes_too_long_is_ended(endless: Path) -> None:
    with running(TwinModel.from_pretrained(endless), timeout_s=1.0) as server:
        status, message = server.refused("/v1/completions", long(max_tokens=4000))
        assert (status, message) == (504, "the request took longer than 1 s")
        connection = server.connect()
        connection.sendall(post("/v1/completions", long(stream=True, max_tokens=4000)))
        said = b""
        while part := connection.recv(1 << 16):
            said += part
        assert b"text_completion" in said
        assert b"[DONE]" not in said
        connection.close()
        assert until(lambda: idle(server), 5)
        assert answers(server)


def test_a_writer_that_died_is_unwell(endless: Path) -> None:
    with running(TwinModel.from_pretrained(endless)) as server:
        assert answers(server)
        writer = server.engine.writer
        assert writer is not None
        writer.stop()
        assert server.refused("/health", None)[0] == 503
        assert server.refused("/v1/completions", long()) == (503, "texts are no longer written; restart the server")


def test_images_come_as_data_uris_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    family = test_images.make(tmp_path_factory.mktemp("vision"), "vit")
    settings = {"exclusive": {"rank": 2}, "router": {"samples_per_expert": 12}}
    folder, picture = build(family.recipe(**settings), family.root / "twin").path, family.root / "pictures/sms0.png"
    uri = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    with running(TwinModel.from_pretrained(folder)) as server:
        status, found = server.ask("/classify", {"model": "tiny", "input": uri})
        assert (status, "label" in found["data"][0]) == (200, True)
        for other in (str(picture), "https://127.0.0.1/a.png", "file:///etc/passwd"):
            status, message = server.refused("/classify", {"model": "tiny", "input": other})
            assert (status, "input must be a data URI" in message) == (400, True)
        status, message = server.refused("/classify", {"model": "tiny", "input": uri[:60]})
        assert (status, "cannot be read" in message) == (400, True)


def started(folder: Path, *options: str) -> tuple[subprocess.Popen[str], Running]:
    """A server in a process of its own."""
    program = [sys.executable, "-m", "twinmerge", "serve", str(folder), "--port", "0", "--name", "tiny", *options]
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"serving tiny, .* at http://127\.0\.0\.1:(\d+)\n", line)
    assert found, line + process.communicate()[1]
    return process, Running(None, int(found[1]))  # type: ignore[arg-type]


def test_told_to_stop_it_answers_what_is_under_way(endless: Path) -> None:
    process, server = started(endless)
    try:
        assert until(lambda: server.ask("/health")[0] == 200)
        found: list[tuple[int, Any]] = []
        asked = [
            threading.Thread(target=lambda: found.append(server.ask("/v1/completions", long(max_tokens=200))))
            for _ in range(6)
        ]
        for one in asked:
            one.start()
        assert until(lambda: server.counted("twinmerge_requests_in_flight") == 6)
        process.send_signal(signal.SIGTERM)
        for one in asked:
            one.join(20)
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()
    assert [status for status, _ in found] == [200] * 6
    assert {answer["usage"]["completion_tokens"] for _, answer in found} == {200}
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["status"] for line in lines if line["route"] == "/v1/completions"] == [200] * 6
    assert "w5" not in log  # nothing of what was asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--timeout", "0"], "must be seconds, 1 or more"),
        (["--wait-ms", "x"], "must be milliseconds, 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "twin", *arguments])
    assert words in capsys.readouterr().err


def test_addresses_names_and_folders_that_cannot_be_are_refused(
    endless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(endless), "--port", str(port)]) == 2
        assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert main(["serve", str(endless), "--port", "0", "--name", "a:b"]) == 2
    assert "must be without a colon, found 'a:b'" in capsys.readouterr().err
    assert main(["serve", str(endless.parent), "--port", "0"]) == 2


def test_what_is_not_installed_is_named(
    endless: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(endless), "--port", "0"]) == 1
    assert "a server needs uvicorn: pip install 'twinmerge[serve]'" in capsys.readouterr().err
