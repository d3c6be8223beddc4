"""The page at /: static, closed to scripts and addresses of others; in a real browser where one is installed."""

import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.running import Running, running
from twinmerge.hf.model import TwinModel

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def server(twin: Callable[..., Path]) -> Iterator[Running]:
    with running(TwinModel.from_pretrained(twin("llama"), dtype=torch.float64), api_key="key") as found:
        yield found


def test_the_page_is_static_and_asks_no_other_server(server: Running) -> None:
    folder = files("twinmerge.serve") / "page"
    for path, name in (("/", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        status, content = server.ask(path)
        assert (status, content) == (200, (folder / name).read_text())
        assert "//" not in re.sub(r"^//.*$", "", content, flags=re.MULTILINE)  # no address of another server
    html = server.ask("/")[1]
    assert not re.search(r"<script(?![^>]*src=)| on\w+=| style=|<style", html)  # nothing that its policy forbids


def test_the_policy_forbids_scripts_and_servers_of_others(server: Running) -> None:
    import urllib.request

    with urllib.request.urlopen(server.url, timeout=10) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'" in policy
    assert "unsafe" not in policy


def test_version_says_what_the_page_needs(server: Running) -> None:
    status, found = server.ask("/version", Authorization="Bearer key")
    assert status == 200
    assert {**found, "version": ""} == {
        "version": "",
        "model": "tiny",
        "experts": ["ag", "sms", "trec"],
        "reads": "texts",
        "answers": "continuation",
        "routes": True,
        "heads": False,
    }


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless browser, where Playwright and Debian's Chromium are installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def answered(page: Any, place: str) -> None:
    """Wait until an answer is there with its times."""
    page.locator(f"#{place}-time", has_text="tokens").wait_for()


def opened(browser: Any, server: Running, **settings: Any) -> tuple[Any, list[str]]:
    """A page with the key given, and what its console says."""
    page = browser.new_context(**settings).new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.url)
    page.get_by_label("API key").fill("key")
    page.get_by_role("button", name="Use").click()
    page.locator("#gate div").nth(2).wait_for()
    return page, said


def test_a_text_is_answered_side_by_side_with_its_gate_as_bars(browser: Any, server: Running) -> None:
    page, said = opened(browser, server)
    page.get_by_label("Text").fill("w24 w30 w26")
    page.get_by_label("Tokens").fill("6")
    page.get_by_label("Text").press("Control+Enter")
    for place in ("mixed", "shared", "alone"):
        answered(page, place)
    (wanted,) = server.ask("/v1/route", {"model": "tiny", "input": "w24 w30 w26"}, Authorization="Bearer key")[1][
        "data"
    ]
    for index, expert in enumerate(("ag", "sms", "trec")):
        bar = page.locator("#gate progress").nth(index)
        assert float(bar.evaluate("bar => bar.value")) == pytest.approx(wanted["gate"][expert], abs=0.01)
    assert wanted["expert"] in page.locator("#route").inner_text()
    assert page.locator("#mixed").inner_text()
    assert [line for line in said if "401" not in line] == []


def test_sliders_set_the_gate_in_the_dark_on_a_narrow_screen(browser: Any, server: Running) -> None:
    page, said = opened(browser, server, viewport={"width": 340, "height": 700}, color_scheme="dark")
    page.get_by_label("set by hand").check()
    page.get_by_role("slider", name="sms").focus()
    for key in ("End", "ArrowLeft"):
        page.keyboard.press(key)
    page.get_by_label("Text").fill("w24 w30")
    page.get_by_label("Tokens").fill("4")
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json))
    page.get_by_role("button", name="Ask").click()
    answered(page, "mixed")
    assert {"ag": 0, "sms": 0.99, "trec": 0} in [body["twin"]["gate"] for body in asked if "twin" in body]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    assert [line for line in said if "401" not in line] == []


def test_an_error_is_said_and_another_tab_goes_on(browser: Any, server: Running) -> None:
    first, _ = opened(browser, server)
    second, _ = opened(browser, server)
    first.get_by_label("Text").fill("w5")
    first.get_by_label("Tokens").fill("4000")
    first.get_by_role("button", name="Ask").click()
    first.get_by_role("alert").wait_for()
    assert "is too long" in first.get_by_role("alert").inner_text()
    second.get_by_label("Text").fill("w5")
    second.get_by_label("Tokens").fill("3")
    second.get_by_role("button", name="Ask").click()
    answered(second, "mixed")
    assert second.get_by_role("alert").count() == 0
