"""Corruptions: deterministic, in range, and what they say they are."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import head
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from mnist_flax.data import Examples
from mnist_flax.errors import InputError
from mnist_flax.evaluation import predict
from mnist_flax.steps import to_float
from mnist_flax.studies import robustness


@pytest.fixture(scope="module")
def images(splits):
    return to_float(splits.test.images[:20])


@pytest.mark.parametrize("corruption", robustness.CORRUPTIONS, ids=lambda c: c.name.split(" (")[0])
def test_corruptions_are_deterministic_and_neutral_where_they_say(corruption, images):
    assert list(corruption.severities) == sorted(corruption.severities)
    assert corruption.neutral in corruption.severities
    for severity in corruption.severities:
        one, two = (np.asarray(corruption.apply(images, severity)) for _ in range(2))
        assert_array_equal(one, two)
        assert one.shape == images.shape
        assert one.dtype == np.float32
        assert one.min() >= 0
        assert one.max() <= 1 + 1e-6
        changed = np.abs(one - images).max()
        assert (changed < 1e-6) == (severity == corruption.neutral)


def test_rotation_is_scipys(images):
    ours = robustness.rotate(images, 30)[:, :, :, 0]
    for mine, image in zip(ours, images[..., 0], strict=True):
        options = {"reshape": False, "order": 1, "mode": "grid-constant"}
        rotated = [ndimage.rotate(image, degrees, **options) for degrees in (30, -30)]
        assert min(np.abs(mine - theirs).max() for theirs in rotated) < 1e-4


def test_a_shift_of_whole_pixels_moves_the_pixels(images):
    assert_allclose(robustness.shift(images, 3)[:, :-3, :-3], images[:, 3:, 3:], rtol=0, atol=1e-5)


def test_zoom_makes_larger():
    image = jnp.zeros((1, 28, 28, 1)).at[:, 12:16, 12:16].set(1.0)
    area = [float(robustness.zoom(image, factor).sum()) for factor in (0.5, 1, 2)]
    assert_allclose(area, [4, 16, 64], rtol=0.1)


def test_occlusion_hides_a_square_in_the_middle():
    """Anywhere in the middle 20 x 20: rows and columns 4 to 23."""
    hidden = 1 - robustness.occlude(jnp.ones((200, 28, 28, 1)), 6)
    assert_array_equal(hidden.sum((1, 2, 3)), np.full(200, 36))
    for axes in ((0, 2, 3), (0, 1, 3)):
        assert_array_equal(np.flatnonzero(np.asarray(hidden).any(axes)), np.arange(4, 24))
    whole = 1 - robustness.occlude(jnp.ones((2, 28, 28, 1)), 20)
    assert_array_equal(whole[:, 4:24, 4:24], np.ones((2, 20, 20, 1)))


@pytest.mark.parametrize(("H", "W"), [(8, 8), (14, 28), (32, 20)])
@pytest.mark.parametrize("side", [0, 2, 4, 10])
def test_occlusion_fits_images_of_other_sizes(H, W, side):
    """A square of that side, or the whole of an image that is smaller, without the margin."""
    hidden = 1 - robustness.occlude(jnp.ones((300, H, W, 1)), side)
    assert_array_equal(hidden.sum((1, 2, 3)), np.full(300, min(side, H) * min(side, W)))
    if 0 < side <= min(H - 2 * (H // 7), W - 2 * (W // 7)):
        for axes, size in (((0, 2, 3), H), ((0, 1, 3), W)):
            seen = np.flatnonzero(np.asarray(hidden).any(axes))
            assert_array_equal(seen, np.arange(size // 7, size - size // 7))


def test_labels_in_a_column_are_refused(whole, splits):
    """Compared with predictions, they would be right as often as any two digits are the same."""
    column = Examples(splits.test.images[:20], splits.test.labels[:20, None])
    with pytest.raises(InputError, match=r"labels\[:, 0\]"):
        robustness.worst_case(whole[0].state, column, grid=((0, 0, 0),))


def test_noise_has_its_deviation():
    grey = jnp.full((20, 28, 28, 1), 0.5)
    assert float((robustness.noise(grey, 0.1) - grey).std()) == pytest.approx(0.1, rel=0.02)


def test_the_worst_case_is_right_under_every_map_and_accuracies_are_in_order(whole, splits):
    state, examples = whole[0].state, head(splits.test, 500)
    images, labels = to_float(examples.images), examples.labels
    grid = ((10, -2, 2), (-10, 2, 0), (0, 0, 0))
    moved = [
        robustness.affine(images, rotate=degrees, shift_y=up / 28, shift_x=left / 28)
        for degrees, up, left in grid
    ]
    hits = np.array([predict(state, seen).argmax(-1) == labels for seen in moved])
    assert len({*hits.mean(1), hits.all(0).mean()}) == 4
    assert robustness.worst_case(state, examples, grid=grid) == hits.all(0).mean()
    dim = robustness.Corruption("brightness", lambda images, share: share * images, (0, 1), 1)
    ((_, found),) = robustness.robustness(state, examples, corruptions=(dim,))
    assert found == [(predict(state, 0 * images).argmax(-1) == labels).mean(), hits[2].mean()]
