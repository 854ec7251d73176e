"""What tests in a real browser share: which there is, a run to show, and digits drawn in it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Of a square of side 1.
STROKES = {
    "7": [[(0.3, 0.25), (0.7, 0.25), (0.45, 0.8)]],
    "1": [[(0.52, 0.2), (0.48, 0.8)]],
    "4": [[(0.4, 0.2), (0.3, 0.55), (0.7, 0.55)], [(0.62, 0.35), (0.6, 0.82)]],
}
# Nothing listens there.
DEAD_PROXIES = {
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
}
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="there is no Chromium, or no Playwright",
)


def script(name, *arguments):
    """Returns the words that run a script of experiments/."""
    return [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *map(str, arguments)]


def without_proxies():
    """Returns this process's environment without what it says of proxies."""
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def train(directory, data_dir):
    """Trains one epoch of `quick`, of 97% or more, and returns the run's directory."""
    words = script("train", "--recipe", "quick", "--workdir", "run", "--data-dir", data_dir)
    subprocess.run(words, check=True, cwd=directory, capture_output=True)
    return directory / "run"


def launch(driver):
    """Returns Chromium, started."""
    return driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def draw(page, strokes, *, left, top, side):
    """Draws strokes with the mouse into a square of the page, in pixels."""
    for first, *others in strokes:
        page.mouse.move(left + first[0] * side, top + first[1] * side)
        page.mouse.down()
        for x, y in others:
            page.mouse.move(left + x * side, top + y * side, steps=12)
        page.mouse.up()
