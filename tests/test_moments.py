"""Moments against NumPy's weighted ones; normalization against SciPy, and by what it is for."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import first
from hypothesis import strategies as st

from mnist_flax.augment import warp_affine
from mnist_flax.errors import InputError
from mnist_flax.moments import POWER, SPREADS, interpolate, moments, normalize


def digits(splits, count):
    return jnp.asarray(splits.train.images[:count], jnp.float32) / 255


def numpy_moments(image_HW):
    """An image's moments by `np.average` and `np.cov`, in float64; a pixel is a square."""
    places = np.indices(image_HW.shape).reshape(2, -1)
    ink = np.asarray(image_HW, np.float64).ravel()
    (yy, yx), (_, xx) = np.cov(places, aweights=ink, ddof=0)
    center_y, center_x = np.average(places, axis=1, weights=ink)
    slant = yx / (yy + 1 / 12)
    about_axis = xx - 2 * slant * yx + slant**2 * yy
    return center_y, center_x, np.sqrt(yy + 1 / 12), np.sqrt(about_axis + 1 / 12), slant


def scipy_normalize(image_HW):
    height, width = image_HW.shape
    center_y, center_x, spread_y, spread_x, slant = numpy_moments(image_HW)
    y, x = np.indices(image_HW.shape)
    y = (y - (height - 1) / 2) * (spread_y / (SPREADS[0] * height)) ** POWER
    x = (x - (width - 1) / 2) * (spread_x / (SPREADS[1] * width)) ** POWER
    places = [center_y + y, center_x + slant * y + x]
    return scipy.ndimage.map_coordinates(
        np.asarray(image_HW, np.float64), places, order=1, mode="grid-constant"
    )


def test_moments_by_hand():
    """Ink at (0, 0) and (2, 1): variance of rows 1, covariance 0.5, and a square's 1/12."""
    image_HW = jnp.zeros((3, 4)).at[0, 0].set(0.3).at[2, 1].set(0.3)
    found = moments(image_HW[None, :, :, None])
    slant = 0.5 / (13 / 12)
    expected = [1, 0.5, np.sqrt(13 / 12), np.sqrt((0.5 - slant) ** 2 + 1 / 12), slant]
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-6)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    hnp.arrays(
        np.float64,
        st.sampled_from([(3, 28, 28, 1), (1, 5, 9, 1), (2, 2, 2, 1)]),
        elements=st.floats(0, 1),
    )
)
def test_moments_are_numpys(images):
    images[:, 0, 0] += 0.01  # none is blank
    with jax.enable_x64(True):
        found = moments(jnp.asarray(images))
    expected = [numpy_moments(image_HWC[..., 0]) for image_HWC in images]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_channels_are_summed(splits):
    images = digits(splits, 4)
    channels = jnp.concatenate([images[:2], images[2:]], axis=-1)
    for found, expected in zip(moments(channels), moments(images[:2] + images[2:]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    parts = jnp.concatenate([0.25 * images, 0.75 * images], axis=-1)
    expected = normalize(images) * jnp.array([0.25, 0.75])[None, None, None]
    np.testing.assert_allclose(normalize(parts), expected, rtol=0, atol=1e-5)


def test_normalization_is_scipys(splits):
    images = digits(splits, 32)
    expected = [scipy_normalize(image_HWC[..., 0]) for image_HWC in images]
    np.testing.assert_allclose(jax.jit(normalize)(images)[..., 0], expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_normalized_digits_are_upright_central_and_of_nearly_one_size(splits):
    images = digits(splits, 500)
    before, after = moments(images), moments(normalize(images))
    assert np.abs(before.slant).max() > 0.5
    # But for a few that the border cuts.
    assert np.quantile(np.abs(after.slant), 0.95) < 0.05
    for center in (after.center_y, after.center_x):
        assert np.quantile(np.abs(center - 13.5), 0.95) < 0.1
    for index, name in enumerate(("spread_y", "spread_x")):
        old, new = getattr(before, name), getattr(after, name)
        expected = (SPREADS[index] * 28) ** POWER * old ** (1 - POWER)
        assert np.median(np.abs(new / expected - 1)) < 0.02, name
        assert new.std() / new.mean() < 0.4 * old.std() / old.mean(), name


def test_slant_and_place_are_taken_back(splits):
    """In enlarged images, whose strokes a second resampling hardly blurs."""
    digits_BHWC = jax.image.resize(digits(splits, 100), (100, 84, 84, 1), "cubic")
    images = jnp.maximum(digits_BHWC, 0)
    slanted = jnp.array([[1.0, 0, 3], [0.2, 1, -12]])  # 0.2 columns a row; moved, too
    warped = warp_affine(images, jnp.broadcast_to(slanted, (100, 2, 3)))
    before = jnp.abs(warped - images).mean()
    after = jnp.abs(normalize(warped) - normalize(images)).mean()
    assert after < 0.05 * before


@pytest.mark.parametrize("size", first([1, 28]))
def test_an_image_without_ink_stays_one_and_has_a_gradient(size):
    blank = jnp.zeros((2, size, size, 1))
    assert not normalize(blank).any()
    grad = jax.grad(lambda images: normalize(images).sum())(blank)
    assert np.isfinite(grad).all()


def test_interpolation_by_hand():
    places = jnp.array([-1.5, -0.5, 0, 0.25, 1, 1.5, 2, 9])
    found = interpolate(jnp.array([10.0, 20.0]), places, axis=0)
    np.testing.assert_allclose(found, [0, 5, 10, 12.5, 20, 10, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(28, 28, 1), (2, 28, 28)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(InputError, match="floating-point"):
        normalize(jnp.zeros(shape))


def test_bytes_are_refused():
    with pytest.raises(InputError, match="uint8"):
        normalize(jnp.zeros((2, 28, 28, 1), jnp.uint8))
