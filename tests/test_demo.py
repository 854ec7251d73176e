"""The demo in a real browser, drawn on with the mouse: with Gradio, Playwright and Chromium."""

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STROKES = {
    "7": [[(0.3, 0.25), (0.7, 0.25), (0.45, 0.8)]],
    "1": [[(0.52, 0.2), (0.48, 0.8)]],
    "4": [[(0.4, 0.2), (0.3, 0.55), (0.7, 0.55)], [(0.62, 0.35), (0.6, 0.82)]],
}

if importlib.util.find_spec("gradio") is None:
    pytest.skip("there is no Gradio", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def url(splits, data_dir, tmp_path_factory):
    """The address of a demo that serves a network of one epoch."""
    del splits
    directory = tmp_path_factory.mktemp("demo")
    train = [sys.executable, str(ROOT / "experiments" / "train.py"), "--recipe", "quick"]
    train += ["--workdir", "run", "--data-dir", str(data_dir)]
    subprocess.run(train, check=True, cwd=directory, capture_output=True)
    words = [sys.executable, str(ROOT / "experiments" / "demo.py"), "run", "--port", "7891"]
    server = subprocess.Popen(words, cwd=directory, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    while "127.0.0.1:7891" not in server.stdout.readline():
        assert server.poll() is None
    yield "http://127.0.0.1:7891"
    server.send_signal(signal.SIGTERM)
    server.wait(timeout=20)
    server.stdout.close()


def draw(page, strokes):
    """Draws on the pad's white sheet, whose corners lie in its canvas."""
    sheet = page.locator("#pad canvas").last.bounding_box()
    side = min(sheet["width"], sheet["height"]) * 0.8
    left = sheet["x"] + (sheet["width"] - side) / 2
    top = sheet["y"] + (sheet["height"] - side) / 2
    for first, *others in strokes:
        page.mouse.move(left + first[0] * side, top + first[1] * side)
        page.mouse.down()
        for x, y in others:
            page.mouse.move(left + x * side, top + y * side, steps=12)
        page.mouse.up()


def test_digits_drawn_with_the_mouse_are_read_as_they_are_drawn(url):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for digit, strokes in STROKES.items():
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            page.goto(url)
            page.wait_for_selector("#pad canvas", timeout=60_000)
            time.sleep(2)
            draw(page, strokes)
            deadline = time.monotonic() + 30
            while digit not in page.locator("#answer").inner_text().split()[1:2]:
                assert time.monotonic() < deadline, page.locator("#answer").inner_text()
                time.sleep(0.2)
            assert page.locator("img").count() >= 1
            page.close()
        browser.close()
