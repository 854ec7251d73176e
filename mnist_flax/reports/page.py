"""A page without a server: a run's network in the browser, as one folder of static files.

The page's own files lie in static/; the network is its ONNX model, which onnxruntime-web computes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from mnist_flax.errors import InputError
from mnist_flax.evaluation import predict
from mnist_flax.reports import export
from mnist_flax.reports.runs import Run

STATIC = Path(__file__).parent / "static"
RUNTIME = "onnxruntime-web@1.30.0"
# The build for CPUs alone: its JavaScript, and its WebAssembly of 14 MB.
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
CHECKED = 64  # images


def find_npm() -> str:
    """Returns the path of npm.

    Raises:
      InputError: it is not installed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"the page needs {RUNTIME}, which npm fetches: install Node.js")
    return npm


def fetch_runtime(npm: str) -> dict[str, bytes]:
    """Fetches onnxruntime-web and returns the files of it that the page needs, by name.

    Raises:
      InputError: npm fails, or what it fetches lacks one.
    """
    with tempfile.TemporaryDirectory() as directory:
        words = [npm, "pack", RUNTIME, "--json", "--pack-destination", directory]
        run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=directory)
        archive = next(Path(directory).glob("*.tgz"), None)
        if run.returncode or archive is None:
            raise InputError(f"npm could not fetch {RUNTIME}: {_reason(run.stdout, run.stderr)}")
        with tarfile.open(archive) as package:
            members = {name: f"package/dist/{name}" for name in RUNTIME_FILES}
            try:
                files = {name: package.extractfile(path) for name, path in members.items()}
            except KeyError as error:
                raise InputError(f"{RUNTIME} is not as expected: {error.args[0]}") from None
            return {name: file.read() for name, file in files.items() if file is not None}


def _reason(printed: str, errors: str) -> str:
    """Returns why npm failed, as one line, from its report in JSON or else its last error."""
    try:
        return " ".join(json.loads(printed)["error"]["summary"].split())
    except (ValueError, LookupError, TypeError):
        return (errors.splitlines() or ["it said nothing"])[-1]


def checked_onnx(run: Run) -> bytes:
    """Returns a run's ONNX model, whose logits of some random images are the run's.

    Raises:
      InputError: packages of the extra `export` are missing, or the logits differ.
    """
    shape = run.info.image_shape
    model = export.to_onnx(run.state, image_shape=shape, class_names=run.info.class_names)
    images_NHWC = np.random.default_rng(0).random((CHECKED, *shape), np.float32)
    expected_NK = predict(run.state, images_NHWC)
    try:
        logits_NK = export.run_onnx(model, images_NHWC)
    except ImportError:
        raise InputError(
            "the check of the model needs onnxruntime: pip install 'mnist_flax[export]'"
        ) from None
    difference = float(np.abs(logits_NK - expected_NK).max())
    if not difference < export.tolerance(run.recipe, expected_NK):
        raise InputError(f"the ONNX model disagrees with the run: by {difference:.1e} in a logit")
    return model


def page_files(run: Run, *, npm: str) -> dict[str, bytes]:
    """Returns the page's files by name.

    Raises:
      InputError: as `fetch_runtime` and `checked_onnx`.
    """
    files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir())}
    files |= fetch_runtime(npm)
    files["classes.json"] = json.dumps(run.info.class_names).encode()
    files["model.onnx"] = checked_onnx(run)
    return files


def write_folder(directory: Path, files: dict[str, bytes]) -> None:
    """Writes a new folder of files, whole or not at all."""
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for name, data in files.items():
            (partial / name).write_bytes(data)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
