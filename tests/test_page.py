"""The page without a server: its script, and the page itself in a real browser, drawn on."""

import base64
import contextlib
import functools
import http.server
import importlib
import io
import itertools
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from browser import ROOT, STROKES, draw, launch, needs_browser, script, train
from PIL import Image

from mnist_flax.errors import InputError
from mnist_flax.evaluation import Evaluation, predict
from mnist_flax.reports import digits, page
from mnist_flax.reports.runs import load_run

GOLDEN = ROOT / "tests" / "golden" / "run"
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm")


@pytest.fixture(scope="module")
def run_dir(splits, data_dir, tmp_path_factory):
    del splits
    return train(tmp_path_factory.mktemp("page"), data_dir)


@pytest.fixture(scope="module")
def url(run_dir):
    """The address of the folder that the script wrote, served as any host of files would."""
    subprocess.run(script("page", run_dir), check=True, capture_output=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=run_dir / "page")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def opened(url, **options):
    """Opens the page, its network loaded, and holds that it asks no other host and has no error."""
    from playwright.sync_api import sync_playwright

    asked, errors = [], []
    with sync_playwright() as driver:
        browser = launch(driver)
        view = browser.new_page(**options)
        view.on("request", lambda request: asked.append(request.url))
        view.on("pageerror", lambda error: errors.append(error.message))
        view.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        view.goto(url)
        view.locator("#answer", has_text="Draw one digit.").wait_for(timeout=60_000)
        yield view
        browser.close()
    assert not errors
    assert f"{url}ort-wasm-simd-threaded.wasm" in asked
    assert not [address for address in asked if not address.startswith((url, "data:"))]


def draw_on_sheet(view, strokes, *, size=1.0):
    """Draws strokes on the sheet, once it is cleared, larger or smaller about its middle."""
    view.click("#clear")
    sheet = view.locator("#sheet").bounding_box()
    side, away = size * sheet["width"], (1 - size) * sheet["width"] / 2
    draw(view, strokes, left=sheet["x"] + away, top=sheet["y"] + away, side=side)


def touch(view, strokes):
    """Draws strokes with a finger."""
    client, sheet = view.context.new_cdp_session(view), view.locator("#sheet").bounding_box()

    def send(kind, *points):
        places = [
            {"x": sheet["x"] + x * sheet["width"], "y": sheet["y"] + y * sheet["height"]}
            for x, y in points
        ]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    for stroke in strokes:
        send("touchStart", stroke[0])
        for start, end in itertools.pairwise(stroke):
            for x, y in np.linspace(start, end, 13)[1:].tolist():
                send("touchMove", (x, y))
        send("touchEnd")


def pixels(view, canvas):
    """Returns a canvas of the page as grey numbers, [H, W] uint8."""
    address = view.evaluate(f"document.querySelector('{canvas}').toDataURL()")
    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return np.asarray(picture.convert("L"))


@pytest.mark.slow
@needs_npm
@needs_browser
def test_digits_drawn_with_the_mouse_are_read(url):
    with opened(url, viewport={"width": 1100, "height": 900}) as view:
        for digit, strokes in STROKES.items():
            draw_on_sheet(view, strokes)
            view.locator("#answer", has_text=f"It is {digit}.").wait_for()
        view.mouse.down()
        view.keyboard.press("Escape")  # amid a stroke, of which the rest is nothing
        view.mouse.move(0, 0)
        view.mouse.up()
        view.locator("#answer", has_text="Draw one digit.").wait_for()
        assert (pixels(view, "#sheet") == 255).all()
        draw_on_sheet(view, [[(0.1, 0.5), (0.9, 0.5)]])
        view.locator("#answer", has_text="That is no digit yet.").wait_for()


@pytest.mark.slow
@needs_npm
@needs_browser
def test_digits_drawn_with_a_finger_on_a_dark_telephone_are_read(url):
    telephone = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}
    with opened(url, color_scheme="dark", **telephone) as view:
        assert view.evaluate("document.documentElement.scrollWidth") == 320  # nothing sticks out
        ground = "getComputedStyle(document.body).backgroundColor"
        assert view.evaluate(ground) == "rgb(22, 22, 22)"
        for digit, strokes in STROKES.items():
            view.tap("#clear")  # of which the browser makes a click a while later
            view.locator("#answer", has_text="Draw one digit.").wait_for()
            touch(view, strokes)
            view.locator("#answer", has_text=f"It is {digit}.").wait_for()
        assert view.evaluate("scrollY") == 0  # the finger drew, and scrolled nothing


@pytest.mark.slow
@needs_npm
@needs_browser
def test_the_page_sees_and_answers_what_the_package_does(url, run_dir):
    """Of the same drawing, also where its strokes are thickened, and of the same 28x28 pixels.

    Not of every drawing as closely: Python's ink is smoothed, and where the centre of mass lies
    halfway between two pixels the one may round up and the other down.
    """
    state = load_run(run_dir).state
    with opened(url, viewport={"width": 1100, "height": 900}) as view:
        for digit, size in (("7", 1.0), ("4", 1.0), ("7", 1.4), ("4", 1.4)):
            draw_on_sheet(view, STROKES[digit], size=size)
            view.locator("#answer", has_text=f"It is {digit}.").wait_for()
            view.wait_for_timeout(500)  # for the answer to the last of the strokes
            ink = digits.find_ink(pixels(view, "#sheet") / np.float32(255))
            image = digits.find_digit(ink).image_HWC
            seen = pixels(view, "#seen")[..., None]
            np.testing.assert_allclose(seen / 255, image / 255, rtol=0, atol=0.15)
            evaluation = Evaluation(predict(state, seen[None]), np.zeros(1, np.int32))
            bars = view.evaluate("[...document.querySelectorAll('progress')].map(b => b.value)")
            np.testing.assert_allclose(bars, evaluation.probabilities_NK[0], rtol=0, atol=1e-4)


@needs_npm
def test_what_npm_could_not_fetch_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path))
    with pytest.raises(InputError) as caught:
        page.fetch_runtime(page.find_npm())
    assert str(caught.value).startswith(f"npm could not fetch {page.RUNTIME}: ")
    assert "ECONNREFUSED" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "--out", "taken"], "out is taken, which exists already; remove it, or name "),
        (["run", "--out", "file/page"], "out is file/page, but file is not a directory; give "),
        (["run", "other"], "name one run directory; see --help"),
        (["gs://bucket/run"], "run must be a local path, but is gs://bucket/run"),
    ],
)
def test_a_bad_input_is_refused_before_any_work(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("file").touch()
    with pytest.raises(InputError, match=f"^{line}"):
        importlib.import_module("page").main(arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


def test_without_npm_nothing_is_written(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    ended = subprocess.run(
        script("page", "run"),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PATH": str(tmp_path)},
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: the page needs {page.RUNTIME}, which npm fetches: install Node.js\n"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    page.write_folder(tmp_path / "a" / "page", {"index.html": b"text"})
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["page", "index.html"]
    assert (tmp_path / "a" / "page" / "index.html").read_bytes() == b"text"
    with pytest.raises(FileNotFoundError):
        page.write_folder(tmp_path / "b", {"index.html": b"text", "no/folder": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
