"""The page at `/`, in a browser: models to choose, tokens that stream, an error that is shown."""

from __future__ import annotations

import re
import time
from pathlib import Path

import browser
import pytest

from quantize.run.serve.application import PAGE


def wait_for(page: browser.Page, condition: str) -> None:
    end = time.monotonic() + 60
    while not page.run(condition):
        assert time.monotonic() < end, page.run("document.body.innerText")
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(browser.PROGRAM is None, reason="needs Chromium")
def test_a_text_streams_into_the_page(running, tmp_path: Path):
    """The text is the server's, with tokens per second beside it; a mistake is told."""
    page = browser.Page(f"http://{running.address}/", tmp_path)
    try:
        wait_for(page, "document.querySelectorAll('#model option').length > 3")
        page.run("at('model').value = 'lm'; at('prompt').value = 'hello'; at('tokens').value = 24")
        page.run("at('write').click()")
        wait_for(page, "at('numbers').textContent.startsWith('24 tokens') && at('stop').disabled")
        body = {"model": "lm", "prompt": "hello", "max_tokens": 24, "temperature": 0.7, "seed": 0}
        reply = running.client.post("/v1/completions", json=body).json()
        assert page.run("at('text').textContent") == "hello" + reply["choices"][0]["text"]
        assert re.search(
            r"first after \d+ ms · [\d.]+ tokens/s", page.run("at('numbers').innerText")
        )
        page.run("at('model').value = 'net'; at('write').click()")
        wait_for(page, "at('numbers').textContent.includes('net writes no text')")
    finally:
        page.close()


def test_the_page_needs_no_other_host():
    """No address in it but the server's own."""
    assert not re.search(r"https?://|src=|@import|url\(", PAGE.read_text())
