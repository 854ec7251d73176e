"""Every public function keeps the house's conventions, and the README's example runs."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ALL

import mnist_flax

ROOT = Path(__file__).parents[1]
PUBLIC = [getattr(mnist_flax, name) for name in mnist_flax.__all__]
FUNCTIONS = [thing for thing in PUBLIC if inspect.isfunction(thing)]
POSITIONAL = {"key", "images_BHWC", "images_NHWC", "state", "states", "batch", "optimizer"}
POSITIONAL |= {"make_model", "recipe", "splits", "name", "examples", "platform", "path"}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_key_comes_first_and_options_are_keyword_only(function):
    parameters = inspect.signature(function).parameters
    if "key" in parameters:
        assert next(iter(parameters)) == "key"
    for parameter in parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            assert parameter.name in POSITIONAL
            assert parameter.default is parameter.empty
        assert parameter.annotation is not parameter.empty
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda t: getattr(t, "__name__", "RECIPES"))
def test_everything_public_is_documented(thing):
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        doc = inspect.getdoc(thing) or ""
        parameters = set(inspect.signature(thing).parameters) - {"key", "state", "states"}
        assert all(name in doc for name in parameters)


def test_the_readmes_example(data_dir):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (code for code in blocks if "train_step" in code)
    example = example.replace("val_size=5000", f"val_size=5000, data_dir={str(data_dir)!r}")
    if not ALL:
        example = example.replace("widths=(16, 32, 64)", "widths=(8, 8, 8)")
        example = example.replace("splits.val)", "splits.val[:1000])")
    run = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = re.fullmatch(r"loss [0-9.]+, validation accuracy ([0-9.]+)%\n", run.stdout)
    assert found is not None
    assert float(found[1]) > 80


def test_to_import_the_package_is_light():
    heavy = [
        "orbax",
        "tensorflow_datasets",
        "matplotlib",
        "tensorboardX",
        "grain",
        "scipy.optimize",
    ]
    code = f"import sys, mnist_flax; print([name for name in {heavy} if name in sys.modules])"
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "[]\n"
