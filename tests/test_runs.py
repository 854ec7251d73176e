"""Weights in one file: those that come with the package, and one's own, there and back."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from conftest import RECIPE, first, head
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from safetensors.numpy import load, save

import mnist_flax
from mnist_flax.errors import InputError
from mnist_flax.evaluation import features, predict
from mnist_flax.loop import fit
from mnist_flax.reports.familiarity import fit_familiarity, measurements
from mnist_flax.reports.results import digest
from mnist_flax.reports.runs import SHIPPED, load_run, pack_weights
from mnist_flax.steps import create_state

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def run(splits, tmp_path_factory):
    """A run of a small network on 2,000 images, and what it knows by sight."""
    few = dataclasses.replace(splits, train=head(splits.train, 2000), val=head(splits.val, 500))
    recipe = dataclasses.replace(RECIPE, epochs=1, stopping=None)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    result = fit(recipe, few, workdir=workdir, progress=False)
    fit_familiarity(result.state, few).save(workdir)
    return load_run(workdir)


@pytest.mark.parametrize("name", first(SHIPPED))
def test_the_shipped_weights_read_digits(name, splits):
    run = mnist_flax.load_run(name)
    images, labels = splits.val.images[:500], splits.val.labels[:500]
    assert (predict(run.state, images).argmax(-1) == labels).mean() > 0.99
    assert run.info == splits.info
    if name == "strong":  # whose many features would be worth another megabyte
        assert run.familiarity is None
        return
    distances = run.familiarity.distances(measurements(run.state, images))
    assert (distances <= 1).mean() > 0.95
    noise = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1)).astype(np.uint8)
    assert (run.familiarity.distances(measurements(run.state, noise)) > 1).all()


def test_the_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in SHIPPED.values()) < 2_000_000


def test_weights_there_and_back_are_the_same_bits(run, tmp_path, splits):
    path = tmp_path / "own.safetensors"
    path.write_bytes(pack_weights(run))
    back = load_run(str(path))
    assert digest(back.state) == digest(run.state)
    assert (back.recipe, back.info) == (run.recipe, run.info)
    assert (back.best_epoch, back.epochs) == (1, 1)
    assert str(back) == f"{path}: weights of epoch 1; 1 of 1 epochs done"
    assert int(back.state.step) == 0
    images = splits.val.images[:100]
    before, after = (
        each.familiarity.distances(measurements(each.state, images)) for each in (run, back)
    )
    assert_allclose(after, before, rtol=0.01)


def test_any_reader_of_safetensors_finds_the_arrays(run):
    arrays = load(pack_weights(run, dtype="float16"))
    kernel = arrays["params/head/kernel"]
    assert kernel.dtype == np.float16
    assert_allclose(kernel, run.state.params["head"]["kernel"], rtol=2**-10, atol=1e-7)
    assert_array_equal(
        arrays["batch_stats/norms/0/mean"].shape, (len(arrays["params/norms/0/bias"]),)
    )


def test_other_files_are_refused_in_one_line(run, tmp_path):
    path = tmp_path / "x.safetensors"
    for data in (b"", b"no weights", save({"a": np.zeros(2, np.float32)})):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"x\.safetensors is not a file of weights that"):
            load_run(path)
    other = dataclasses.replace(
        run.recipe, model=dataclasses.replace(run.recipe.model, hidden=(3,))
    )
    path.write_bytes(pack_weights(dataclasses.replace(run, recipe=other)))
    with pytest.raises(InputError, match="another network than its recipe makes"):
        load_run(path)
    with pytest.raises(InputError, match="there is no run in"):
        load_run(tmp_path / "nothing")


def test_features_are_what_the_classifier_sees(run, splits):
    """By hand: its kernel and bias make them into the logits."""
    images = splits.val.images[:700]  # more than a batch
    kernel, bias = (np.asarray(run.state.params["head"][name]) for name in ("kernel", "bias"))
    by_hand = features(run.state, images) @ kernel + bias
    assert_allclose(by_hand, predict(run.state, images), rtol=1e-4, atol=1e-4)


def test_a_model_without_features_is_told_so(splits):
    class Linear(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(784, 10, rngs=rngs)

        def __call__(self, images_BHWC):
            return self.fc(images_BHWC.reshape(len(images_BHWC), -1))

    state = create_state(jax.random.key(0), Linear, optax.sgd(0.1))
    with pytest.raises(InputError, match=r"no method features\(images_BHWC\)"):
        features(state, splits.val.images[:2])


def test_predict_reads_a_picture_without_any_training(splits, tmp_path):
    (index,) = np.flatnonzero(splits.val.labels == 7)[:1]
    Image.fromarray(255 - splits.val.images[index, :, :, 0]).resize((280, 280)).save(
        tmp_path / "digit.png"
    )
    words = [sys.executable, str(EXPERIMENTS / "predict.py"), "digit.png"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("digit.png: 7 (")
    assert [path.name for path in tmp_path.iterdir()] == ["digit.png"]
