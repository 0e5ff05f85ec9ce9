"""The page at ``/``: in a real browser, by keyboard, large and small."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.servekit.server.browser import CHROMIUM, Browser
from tests.servekit.server.processes import ServerProcess, wait_until

from servekit.server.routes.page import FILES

KEY = "key-for-the-page"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


def test_its_files_are_strict_and_bring_nothing_from_elsewhere(http: httpx.Client) -> None:
    for path in FILES:
        answer = http.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", answer.text)
    page = http.get("/").text
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on[a-z]+=", page), "nothing inline"


@in_browser
def test_a_chat_by_keyboard(server: ServerProcess, browser: Browser) -> None:
    browser.resize(1000, 800, is_phone=False)
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model')?.textContent.startsWith('M,')")
    browser.value("document.getElementById('max_tokens').value = 12")
    browser.value("document.getElementById('prompt').focus()")
    browser.type("hello")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.about')?.textContent.includes('tokens/s')")
    assert browser.value("document.querySelector('.user').textContent") == "hello"
    assert browser.value("document.querySelector('.assistant').textContent.length") > 0
    assert "12 tokens" in browser.value("document.querySelector('.about').textContent")
    assert browser.value("document.activeElement.id") == "prompt", "the next message can be typed"
    browser.wait_for("document.getElementById('hits').textContent.includes('%')")
    browser.wait_for("document.getElementById('running').textContent === '0'")
    assert not browser.complaints
    assert len(browser.screenshot()) > 5_000


@in_browser
def test_escape_stops_an_answer_and_an_error_is_said(server: ServerProcess, browser: Browser) -> None:
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model')?.textContent.startsWith('M,')")
    browser.value("document.getElementById('max_tokens').value = 900")
    browser.value("document.getElementById('system').value = 'x'")
    browser.value("document.getElementById('prompt').focus()")
    browser.type("hello")
    with server.frozen():  # the answer cannot end by itself
        browser.press("Enter")
        browser.wait_for("!document.getElementById('stop').disabled")
        assert wait_until(lambda: server.requests() == 1)
        browser.press("Escape")
        browser.wait_for("document.getElementById('stop').disabled")
        assert wait_until(lambda: server.requests() == 0)
    browser.value("document.getElementById('max_tokens').value = 5000")
    browser.type("again")
    browser.press("Enter")
    browser.wait_for("document.getElementById('status').classList.contains('error')")
    assert "max_completion_tokens" in browser.value("document.getElementById('status').textContent")


LONG_CHAT = "for (let i = 0; i < 60; i++) add('said user', 'line ' + i)"
SHOWN = """((id) => {
  const place = document.getElementById(id).getBoundingClientRect();
  return place.top >= 0 && place.bottom <= innerHeight;
})"""


@in_browser
@pytest.mark.parametrize(("width", "height", "is_phone"), [(1000, 700, False), (360, 640, True), (640, 360, True)])
def test_a_long_chat_leaves_the_fields_in_sight(
    server: ServerProcess, browser: Browser, width: int, height: int, is_phone: bool
) -> None:
    browser.resize(width, height, is_phone=is_phone)
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model')?.textContent.startsWith('M,')")
    browser.value(LONG_CHAT)
    for name in ("prompt", "send", "stop", "live"):
        assert browser.value(f"{SHOWN}('{name}')"), name
    assert browser.value("document.documentElement.scrollHeight <= innerHeight"), "the chat scrolls, not the page"
    assert browser.value("isAtEnd()"), "what was said last is in sight"
    browser.value("document.querySelector('details').open = true")
    assert browser.value(f"{SHOWN}('prompt')")
    assert browser.value("document.documentElement.scrollWidth") <= width


@in_browser
def test_who_reads_above_is_not_pulled_down(server: ServerProcess, browser: Browser) -> None:
    browser.resize(1000, 700, is_phone=False)
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model')?.textContent.startsWith('M,')")
    browser.value(LONG_CHAT)
    browser.value("document.getElementById('max_tokens').value = 200")
    browser.value("document.getElementById('prompt').focus()")
    browser.type("hello")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.assistant')?.textContent.length > 0")
    browser.value("document.getElementById('chat').scrollTop = 0")
    browser.wait_for("document.getElementById('stop').disabled")
    assert browser.value("document.getElementById('chat').scrollTop") == 0


@in_browser
def test_every_field_is_reached_by_the_tab_key(server: ServerProcess, browser: Browser) -> None:
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model')?.textContent.startsWith('M,')")
    browser.value("document.querySelector('details').open = true")
    browser.value("document.getElementById('prompt').focus()")
    seen = []
    for _ in range(14):
        seen.append(browser.value("document.activeElement.id || document.activeElement.tagName"))
        browser.press("Tab")
    wanted = ["prompt", "send", "clear", "SUMMARY", "system", "temperature", "top_p", "max_tokens", "seed", "key"]
    assert [name for name in seen if name in wanted][:10] == wanted


PICTURE = """(async () => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 8;
  const blob = await new Promise((done) => canvas.toBlob(done));
  const files = new DataTransfer();
  files.items.add(new File([blob], 'x.png', { type: 'image/png' }));
  document.getElementById('picture').files = files.files;
  document.body.dataset.chosen = 'yes';
})()"""


@in_browser
def test_a_picture_is_offered_where_the_model_sees_and_sent_as_a_part(server: ServerProcess, browser: Browser) -> None:
    """No model here sees: told otherwise, the page sends the picture, and the server says why it will not do."""
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model')?.textContent.startsWith('M,')")
    assert browser.value("document.getElementById('with-picture').hidden")
    browser.value("showAbilities(['text', 'image'])")
    assert not browser.value("document.getElementById('with-picture').hidden")
    browser.value(PICTURE)
    browser.wait_for("document.body.dataset.chosen === 'yes'")
    before = len(browser.complaints)
    browser.value("document.getElementById('prompt').focus()")
    browser.type("what is this?")
    browser.press("Enter")
    browser.wait_for("document.getElementById('status').textContent.includes('cannot see')")
    assert browser.value("document.querySelector('.user img').naturalWidth") == 8, "the policy shows it"
    assert all("400" in complaint for complaint in browser.complaints[before:])
    assert browser.value("messages.length") == 0, "it is not asked again with the next question"


@in_browser
def test_it_fits_a_phone_and_every_field_has_a_name(server: ServerProcess, browser: Browser) -> None:
    browser.resize(360, 640, is_phone=True)
    browser.open(f"{server.url}/")
    browser.wait_for("document.getElementById('model')?.textContent.startsWith('M,')")
    assert browser.value("document.documentElement.scrollWidth") <= 360
    nameless = "[...document.querySelectorAll('input, textarea')].filter((e) => !e.labels.length).length"
    assert browser.value(nameless) == 0
    small = "[...document.querySelectorAll('button')].filter((e) => e.getBoundingClientRect().height < 44).length"
    assert browser.value(small) == 0, "a finger finds every button"
    assert len(browser.screenshot()) > 5_000


@in_browser
def test_with_keys_the_page_asks_for_one(tiny_model: Path, browser: Browser) -> None:
    server = ServerProcess(tiny_model, "--public-page", env={"SERVEKIT_API_KEY": KEY})
    try:
        assert httpx.get(f"{server.url}/").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        browser.open(f"{server.url}/")
        browser.wait_for("document.getElementById('status')?.textContent.includes('API key')")
        browser.value(f"document.getElementById('key').value = '{KEY}'")
        browser.value("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.wait_for("document.getElementById('model').textContent.startsWith('M,')")
    finally:
        server.stop()
