"""What a network knows by sight: a distance by hand, and pictures that are nothing like digits."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import RECIPE, head
from numpy.testing import assert_allclose
from PIL import Image
from scipy.spatial.distance import mahalanobis

from mnist_flax.loop import fit
from mnist_flax.reports import familiarity
from mnist_flax.reports.familiarity import Familiarity, fit_familiarity, measurements

PREDICT = Path(__file__).parents[1] / "experiments" / "predict.py"


def test_the_distance_is_mahalanobiss_from_the_nearest_class():
    rng = np.random.default_rng(0)
    means, points = rng.normal(size=(3, 4)), rng.normal(size=(7, 4))
    root = rng.normal(size=(4, 4))
    precision = np.linalg.inv(root @ root.T + np.eye(4))
    found = Familiarity(means, precision, limit=2.0).distances(points)
    expected = [min(mahalanobis(p, m, precision) ** 2 for m in means) / 2 for p in points]
    assert_allclose(found, expected, rtol=1e-10)


def strange_pictures():
    rng = np.random.default_rng(0)
    yield "noise", rng.integers(0, 256, (50, 28, 28, 1)).astype(np.uint8)
    yield "a blank page", np.zeros((1, 28, 28, 1), np.uint8)
    yield "stripes", np.tile(np.uint8([255, 0, 0, 0]), (1, 28, 7))[..., None]


def test_digits_are_familiar_and_other_pictures_are_not(whole, splits, small, tmp_path):
    """By the network of seconds: half of it are the images that set the limit, about 1 in 100."""
    state = whole[0].state
    known = fit_familiarity(state, small)
    strange = known.distances(measurements(state, splits.test.images[:2000])) > 1
    assert strange.mean() < 0.05
    for name, images in strange_pictures():
        assert (known.distances(measurements(state, images)) > 1).mean() > 0.9, name
    known.save(tmp_path)
    again = familiarity.load(tmp_path)
    assert again is not None
    assert again.limit == known.limit
    assert np.array_equal(again.means_KF, known.means_KF)
    assert familiarity.load(whole[1]) is None


@pytest.mark.slow
def test_predict_says_when_a_picture_is_strange(small, splits, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    state = fit(recipe, small, workdir=tmp_path / "run", progress=False).state
    Image.fromarray(255 - splits.test.images[0, :, :, 0]).save(tmp_path / "digit.png")
    known = fit_familiarity(state, small)
    words = [sys.executable, str(PREDICT), "run", "digit.png"]

    def predict(limit, *options):
        dataclasses.replace(known, limit=limit).save(tmp_path / "run")
        run = subprocess.run(
            [*words, *options], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert "nothing like" not in predict(known.limit)
    assert "nothing like" in predict(1e-6)
    digits = [json.loads(predict(limit, "--json"))[0]["digits"][0] for limit in (1.0, 2.0)]
    assert digits[0]["distance"] == pytest.approx(2 * digits[1]["distance"])
    assert [digit["familiar"] for digit in digits] == [digit["distance"] <= 1 for digit in digits]


def test_a_class_that_few_have_is_no_matter(whole, small):
    """An image of one class alone among those that are fitted."""
    few = dataclasses.replace(small, train=head(small.train, 30))
    assert np.isfinite(fit_familiarity(whole[0].state, few).limit)
