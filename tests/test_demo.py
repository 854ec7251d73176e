"""The demo in a real browser, drawn on with the mouse: with Gradio, Playwright and Chromium."""

import contextlib
import importlib.util
import signal
import socket
import subprocess
import time
import urllib.request

import demo
import pytest
from browser import (
    DEAD_PROXIES,
    STROKES,
    draw,
    launch,
    needs_browser,
    script,
    train,
    without_proxies,
)

from mnist_flax.errors import InputError

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="there is no Gradio"
)


@pytest.fixture(scope="module")
def run(splits, data_dir, tmp_path_factory):
    del splits
    return train(tmp_path_factory.mktemp("demo"), data_dir)


@contextlib.contextmanager
def serve(run, *options, said):
    """Serves the demo behind proxies that do not answer, until the end of the block."""
    server = subprocess.Popen(
        script("demo", run, *options),
        env=without_proxies() | DEAD_PROXIES,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        while said not in server.stdout.readline():
            assert server.poll() is None
        yield
        assert server.poll() is None
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=20)
        server.stdout.close()


def draw_on_pad(page, strokes):
    """Draws on the pad's white sheet, whose corners lie in its canvas."""
    sheet = page.locator("#pad canvas").last.bounding_box()
    side = min(sheet["width"], sheet["height"]) * 0.8
    left = sheet["x"] + (sheet["width"] - side) / 2
    draw(page, strokes, left=left, top=sheet["y"] + (sheet["height"] - side) / 2, side=side)


@needs_gradio
@needs_browser
def test_digits_drawn_with_the_mouse_are_read_as_they_are_drawn(run):
    from playwright.sync_api import sync_playwright

    with serve(run, "--port", 7891, said="127.0.0.1:7891"), sync_playwright() as driver:
        browser = launch(driver)
        for digit, strokes in STROKES.items():
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            page.goto("http://127.0.0.1:7891")
            page.wait_for_selector("#pad canvas", timeout=60_000)
            time.sleep(2)
            draw_on_pad(page, strokes)
            deadline = time.monotonic() + 30
            while digit not in page.locator("#answer").inner_text().split()[1:2]:
                assert time.monotonic() < deadline, page.locator("#answer").inner_text()
                time.sleep(0.2)
            assert page.locator("img").count() >= 1
            page.close()
        browser.close()


@needs_gradio
def test_as_in_a_container_the_demo_answers_at_every_address(run):
    """127.0.0.2 is none that a server at 127.0.0.1 alone would answer at."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with serve(run, "--port", 7893, "--host", "0.0.0.0", said=":7893"):
        for address in ("127.0.0.1", "127.0.0.2"):
            with direct.open(f"http://{address}:7893", timeout=60) as response:
                assert b"mnist_flax" in response.read()


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "Cannot assign requested address"),  # of an example network (RFC 5737)
        ("ä..b", "label empty or too long"),
    ],
)
def test_an_address_that_is_not_this_machines_is_refused(host, reason):
    with pytest.raises(InputError, match=f"^cannot serve on {host}, port 7894: .*{reason}"):
        demo.require_free(host, 7894)


def test_a_port_that_is_taken_is_said_before_any_work(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = script("demo", "run", "--port", port)
        ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: cannot serve on 127.0.0.1, port {port}: Address already in use\n"
    )
