"""The chat page in a real browser: needs playwright and a Chromium of the system."""

import re
import shutil
import time

import pytest

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api")
PHONE = {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    url, _ = address
    page = browser.new_page(viewport=PHONE)
    page.set_default_timeout(20_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(error))
    page.on("request", lambda asked: asked.url.startswith(url) or wrong.append(asked.url))
    page.goto(url)
    page.wait_for_selector(".empty")
    yield page
    page.close()
    assert not wrong


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def set_tokens(page, count):
    page.click("#open")
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", str(count))
    page.click("dialog .main")


def test_a_conversation(page, model, tokenizer):
    from pocketlm.runtime.generate import generate

    set_tokens(page, 12)
    ask(page, "hello")
    page.locator(".facts").nth(0).wait_for()
    alone = generate(model, tokenizer, "[user]hello[assistant]", chat=False, max_new_tokens=12)
    assert page.text_content(".assistant .body") == alone.text
    assert "12 tokens" in page.text_content(".facts")
    assert "cut off" in page.text_content(".facts")
    ask(page, "and <b>more</b>")
    page.locator(".facts").nth(1).wait_for()
    assert page.locator("#log b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.click("#new")
    assert page.locator(".message").count() == 0


def test_stop_ends_the_answer_on_the_server(page, address, monkeypatch):
    _, service = address
    advance = service.scheduler._batch.advance
    monkeypatch.setattr(
        service.scheduler._batch, "advance", lambda ids: time.sleep(0.05) or advance(ids)
    )
    ask(page, "hello")
    page.locator(".assistant .body", has_text=re.compile(".{4}")).wait_for()
    assert page.text_content("#send") == "Stop"
    page.click("#send")
    page.locator(".facts").nth(0).wait_for()
    assert "stopped" in page.text_content(".facts")
    assert page.text_content("#send") == "Send"
    until = time.monotonic() + 10
    while service.scheduler.running:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_error_is_shown_and_can_be_tried_again(page):
    set_tokens(page, 5000)
    ask(page, "hello")
    page.wait_for_selector(".error")
    assert "more than the 200 that fit" in page.text_content(".error span")
    set_tokens(page, 3)
    page.click(".error button")
    page.locator(".facts").nth(0).wait_for()
    assert page.locator(".error").count() == 0


def test_a_server_that_has_gone_is_said(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "hello")
    page.wait_for_selector(".error")
    assert "cannot be reached" in page.text_content(".error span")
