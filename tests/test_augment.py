"""Augmentations against SciPy, against Keras's definition, and against answers worked by hand."""

import functools
import subprocess
import sys
import textwrap

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import strategies as st

from mnist_flax.augment import (
    affine_matrix,
    random_affine,
    random_changes,
    random_crop,
    random_erasing,
    random_flip,
    warp_affine,
)
from mnist_flax.errors import InputError

RANGES = {"rotate": 12.0, "shift": 0.1, "zoom": 0.1, "shear": 7.0}


def keras_matrix(*, theta, tx, ty, shear, zx, zy, height, width):
    """Keras's matrix as its source defines it: 3x3 products in float64, "x" being the rows."""
    theta, shear = np.deg2rad(theta), np.deg2rad(shear)
    rotation = [[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]]
    shift = [[1, 0, tx], [0, 1, ty], [0, 0, 1]]
    shearing = [[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]]
    zoom = np.diag([zx, zy, 1])
    to_center = [[1, 0, height / 2 - 0.5], [0, 1, width / 2 - 0.5], [0, 0, 1]]
    from_center = [[1, 0, 0.5 - height / 2], [0, 1, 0.5 - width / 2], [0, 0, 1]]
    chain = [to_center, rotation, shift, shearing, zoom, from_center]
    return np.linalg.multi_dot([np.asarray(m, np.float64) for m in chain])[:2]


def scipy_warp(image_HWC, matrix_23):
    """Resample by SciPy, in float64."""
    channels = [
        scipy.ndimage.affine_transform(
            channel, matrix_23[:, :2], matrix_23[:, 2], order=1, mode="grid-constant", cval=0.0
        )
        for channel in np.moveaxis(np.asarray(image_HWC, np.float64), -1, 0)
    ]
    return np.stack(channels, axis=-1)


def digits(splits, count):
    return jnp.asarray(splits.train.images[:count], jnp.float32) / 255


def ramps(batch_size, size):
    """Draw images whose two channels hold their own y and x: inside, a warp shows its map."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    return jnp.asarray(np.tile(np.stack([y, x], axis=-1), (batch_size, 1, 1, 1)))


def drawn_parameters(key, ranges, *, batch_size, size=15):
    """Read the parameters of each image's map off warped ramps, in float64."""
    with jax.enable_x64(True):
        warped = np.asarray(random_affine(key, ramps(batch_size, size), **ranges))
    c = size // 2
    at_center, below, right = warped[:, c, c], warped[:, c + 1, c], warped[:, c, c + 1]
    column_y, column_x = (below - at_center).T, (right - at_center).T  # each (to y, to x)
    rotation = np.arctan2(column_y[1], column_y[0])
    skewed = np.arctan2(-column_x[0], column_x[1])
    offset_y, offset_x = (at_center - c).T
    return {
        "rotate": np.rad2deg(rotation),
        "shift_y": (np.cos(rotation) * offset_y + np.sin(rotation) * offset_x) / size,
        "shift_x": (np.cos(rotation) * offset_x - np.sin(rotation) * offset_y) / size,
        "zoom_y": np.hypot(*column_y) - 1,
        "zoom_x": np.hypot(*column_x) - 1,
        "shear": np.rad2deg(skewed - rotation),
    }


# --- warp_affine


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-12), ("float32", 5e-5)])
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    shape=st.sampled_from([(28, 28, 1), (5, 8, 3), (9, 4, 1), (1, 7, 2)]),
    matrices=hnp.arrays(np.float64, (2, 2, 2), elements=st.floats(-2, 2)),
    offsets=hnp.arrays(np.float64, (2, 2, 1), elements=st.floats(-20, 20)),
    seed=st.integers(0, 2**32 - 1),
)
def test_warp_is_scipys(dtype, atol, shape, matrices, offsets, seed):
    images = np.random.default_rng(seed).uniform(size=(2, *shape)).astype(dtype)
    matrices_B23 = np.concatenate([matrices, offsets], axis=-1).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        warped = jax.jit(warp_affine)(jnp.asarray(images), jnp.asarray(matrices_B23))
    assert warped.dtype == dtype
    expected = np.stack(list(map(scipy_warp, images, matrices_B23.astype(np.float64))))
    np.testing.assert_allclose(warped, expected, rtol=0, atol=atol)


def test_warp_of_digits_is_scipys(splits):
    images = digits(splits, 16)
    angles = np.linspace(-180, 180, 16)
    matrices = affine_matrix(
        rotate=angles, shear=20.0, zoom_y=0.8, shift_x=0.1, height=28, width=28
    )
    expected = np.stack(list(map(scipy_warp, images, np.asarray(matrices, np.float64))))
    np.testing.assert_allclose(warp_affine(images, matrices), expected, rtol=0, atol=1e-5)


def warp_one(image_HW, **parameters):
    """Warp one single-channel image; rows and columns back."""
    height, width = image_HW.shape
    matrix_23 = affine_matrix(**parameters, height=height, width=width)
    images = jnp.asarray(image_HW, jnp.float32)[None, :, :, None]
    return np.asarray(warp_affine(images, matrix_23[None]))[0, :, :, 0]


IMAGE = np.arange(1.0, 17.0).reshape(4, 4)


def test_shift_by_one_pixel():
    up = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [0, 0, 0, 0]]
    right = [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15]]
    np.testing.assert_array_equal(warp_one(IMAGE, shift_y=0.25), up)
    np.testing.assert_array_equal(warp_one(IMAGE, shift_x=-0.25), right)


def test_the_border_fades_within_one_pixel():
    ones = np.ones((1, 4))
    np.testing.assert_array_equal(warp_one(ones, shift_x=0.5 / 4), [[1, 1, 1, 0.5]])
    np.testing.assert_array_equal(warp_one(ones, shift_x=-0.25 / 4), [[0.75, 1, 1, 1]])


def test_quarter_turn_is_clockwise():
    clockwise = [[13, 9, 5, 1], [14, 10, 6, 2], [15, 11, 7, 3], [16, 12, 8, 4]]
    np.testing.assert_allclose(warp_one(IMAGE, rotate=90.0), clockwise, atol=1e-5)


def test_zoom_of_two_halves_the_content():
    # Output columns -3, -1, 1, 3 (halves) from the centre show input -6, -2, 2, 6 (halves):
    # columns -1.5, 0.5, 2.5 and 4.5 of the row.
    expected = [[0, 1.5, 3.5, 0]]
    np.testing.assert_allclose(warp_one(IMAGE[:1], zoom_x=2.0), expected)
    np.testing.assert_allclose(warp_one(IMAGE[:1].T, zoom_y=2.0), np.transpose(expected))


def test_shear_slides_rows_up_and_squeezes_columns():
    # sin 90 degrees = 1 and cos 90 degrees = 0: output (y, x) about the centre shows (y - x, 0).
    matrix_23 = affine_matrix(shear=90.0, height=3, width=3)
    np.testing.assert_allclose(matrix_23, [[1, -1, 1], [0, 0, 1]], atol=1e-6)


# --- affine_matrix


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    angles=st.tuples(st.floats(-180, 180), st.floats(-80, 80)),
    shifts=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)),
    zooms=st.tuples(st.floats(0.5, 1.5), st.floats(0.5, 1.5)),
    size=st.sampled_from([(28, 28), (5, 8), (1, 3)]),
)
def test_matrix_is_keras(angles, shifts, zooms, size):
    height, width = size
    with jax.enable_x64(True):
        matrix_23 = affine_matrix(
            rotate=angles[0],
            shear=angles[1],
            shift_y=shifts[0],
            shift_x=shifts[1],
            zoom_y=zooms[0],
            zoom_x=zooms[1],
            height=height,
            width=width,
        )
    expected = keras_matrix(
        theta=angles[0],
        shear=angles[1],
        tx=shifts[0] * height,
        ty=shifts[1] * width,
        zx=zooms[0],
        zy=zooms[1],
        height=height,
        width=width,
    )
    np.testing.assert_allclose(matrix_23, expected, rtol=0, atol=1e-12)


def test_matrices_take_the_leading_axes_of_the_parameters():
    assert affine_matrix(height=28, width=28).shape == (2, 3)
    assert affine_matrix(rotate=jnp.zeros((5, 4)), zoom_x=2.0, height=8, width=8).shape == (
        5,
        4,
        2,
        3,
    )


# --- random_affine: the draws


@pytest.mark.parametrize(
    ("ranges", "moved"),
    [
        ({"rotate": 30.0}, {"rotate"}),
        ({"shift": 0.2}, {"shift_y", "shift_x"}),
        ({"zoom": 0.3}, {"zoom_y", "zoom_x"}),
        ({"shear": 20.0}, {"shear"}),
        (RANGES, {"rotate", "shift_y", "shift_x", "zoom_y", "zoom_x", "shear"}),
    ],
)
def test_draws_are_uniform_in_their_range(ranges, moved):
    parameters = drawn_parameters(jax.random.key(0), ranges, batch_size=4096)
    for name, values in parameters.items():
        limit = ranges.get(name.removesuffix("_y").removesuffix("_x"), 0.0)
        assert np.abs(values).max() <= limit + 1e-9, name  # 1e-9: of reading pixels
        if name in moved:
            assert scipy.stats.kstest(values / limit, "uniform", args=(-1, 2)).pvalue > 0.01, name


def test_draws_of_one_image_are_independent():
    parameters = drawn_parameters(jax.random.key(1), RANGES, batch_size=4096)
    correlation = np.corrcoef(np.stack(list(parameters.values())))
    assert np.abs(correlation - np.eye(6)).max() < 4 / np.sqrt(4096)


def test_draws_of_neighbouring_images_are_independent():
    angles = drawn_parameters(jax.random.key(2), RANGES, batch_size=4096)["rotate"]
    assert abs(np.corrcoef(angles[:-1], angles[1:])[0, 1]) < 4 / np.sqrt(4096)


def test_same_key_same_images(splits):
    images = digits(splits, 16)
    first = random_affine(jax.random.key(3), images, **RANGES)
    np.testing.assert_array_equal(first, random_affine(jax.random.key(3), images, **RANGES))
    other = random_affine(jax.random.key(4), images, **RANGES)
    assert np.all(np.any(np.asarray(first != other), axis=(1, 2, 3)))


def test_an_image_depends_on_its_place_not_on_the_batch(splits):
    images = digits(splits, 16)
    augment = jax.jit(lambda images: random_affine(jax.random.key(5), images, **RANGES))
    np.testing.assert_array_equal(augment(images[:8]), augment(images)[:8])
    # In a batch of 4 the compiler may fuse a product and a sum that it otherwise rounds apart.
    np.testing.assert_allclose(augment(images[:4]), augment(images)[:4], rtol=0, atol=1e-5)


def test_a_key_means_the_same_geometry_in_every_precision(splits):
    images = digits(splits, 8)
    single = random_affine(jax.random.key(6), images, **RANGES)
    with jax.enable_x64(True):
        double = random_affine(jax.random.key(6), images.astype(jnp.float64), **RANGES)
    half = random_affine(jax.random.key(6), images.astype(jnp.bfloat16), **RANGES)
    assert (single.dtype, double.dtype, half.dtype) == (jnp.float32, jnp.float64, jnp.bfloat16)
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-5)
    # bfloat16 keeps 8 bits: half a unit in the last place of 1 is 2**-9, on input and output.
    np.testing.assert_allclose(np.asarray(half, np.float32), single, rtol=0, atol=2**-7)


# --- random_affine: the images


@pytest.mark.parametrize("transform", [random_affine, jax.jit(random_affine)])
def test_ranges_of_zero_change_no_bit(splits, transform):
    images = digits(splits, 32)
    np.testing.assert_array_equal(transform(jax.random.key(7), images), images)
    color = jax.random.uniform(jax.random.key(8), (3, 5, 8, 3))
    np.testing.assert_array_equal(transform(jax.random.key(7), color), color)


def test_channels_move_together(splits):
    gray = digits(splits, 4)
    color = jnp.concatenate([gray, 2 * gray, 1 - gray], axis=-1)
    warped = random_affine(jax.random.key(9), color, **RANGES)
    expected = random_affine(jax.random.key(9), gray, **RANGES)
    assert warped.shape == (4, 28, 28, 3)
    np.testing.assert_allclose(warped[..., :1], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(warped[..., 1:2], 2 * expected, rtol=0, atol=2e-6)


def test_traced_ranges_can_be_swept(splits):
    images = digits(splits, 8)
    angles = jnp.asarray([0.0, 10.0, 45.0])
    sweep = jax.vmap(lambda angle: random_affine(jax.random.key(10), images, rotate=angle))
    swept = jax.jit(sweep)(angles)
    np.testing.assert_array_equal(swept[0], images)
    for angle, warped in zip((0.0, 10.0, 45.0), swept, strict=True):
        expected = random_affine(jax.random.key(10), images, rotate=angle)
        np.testing.assert_allclose(warped, expected, rtol=0, atol=1e-5)


def test_vmap_over_keys_and_stacks_and_scan_over_steps(splits):
    stack = digits(splits, 24).reshape(3, 8, 28, 28, 1)
    keys = jax.random.split(jax.random.key(11), 3)
    mapped = jax.vmap(lambda key, images: random_affine(key, images, **RANGES))(keys, stack)
    _, scanned = jax.lax.scan(
        lambda carry, step: (carry, random_affine(step[0], step[1], **RANGES)), 0, (keys, stack)
    )
    for i in range(3):
        expected = random_affine(keys[i], stack[i], **RANGES)
        np.testing.assert_allclose(mapped[i], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(scanned[i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "images", [jnp.zeros((2, 28, 28, 1), jnp.uint8), jnp.zeros((28, 28, 1)), jnp.zeros((2, 784))]
)
def test_other_than_floating_bhwc_is_refused(images):
    with pytest.raises(InputError, match=r"images must be floating-point \[B, H, W, C\], not "):
        random_affine(jax.random.key(12), images, rotate=10.0)
    with pytest.raises(InputError, match=r"\[B, H, W, C\]"):
        warp_affine(images, jnp.zeros((2, 2, 3)))


def test_two_devices_give_the_bits_of_one_without_talking():
    program = """
        import re
        import jax
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from mnist_flax.augment import random_affine

        jax.config.update("jax_num_cpu_devices", 2)
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("batch"))
        key = jax.random.key(0)
        images = np.random.default_rng(0).random((32, 28, 28, 1), np.float32)
        sharded = jax.device_put(images, sharding)

        @jax.jit
        def augment(key, images):
            return random_affine(key, images, rotate=12.0, shift=0.1, zoom=0.1, shear=7.0)

        result = augment(key, sharded)
        assert result.sharding.is_equivalent_to(sharding, 4), result.sharding
        np.testing.assert_array_equal(result, augment(key, images))
        compiled = augment.lower(key, sharded).compile().as_text()
        talk = r"all-gather|all-reduce|all-to-all|collective|reduce-scatter"
        assert "gather" in compiled and not re.search(talk, compiled)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


# --- flip, crop and erasing


def numbered(count, height=6, width=8):
    """Images whose pixels are all different, 1 and more."""
    return 1 + jnp.arange(count * height * width, dtype=jnp.float32).reshape(
        count, height, width, 1
    )


def test_flip_by_hand():
    images = np.asarray(numbered(400))
    flipped = np.asarray(random_flip(jax.random.key(0), images))
    pairs = list(zip(flipped, images, strict=True))
    mirrored = np.array([np.array_equal(own, before[:, ::-1]) for own, before in pairs])
    same = np.array([np.array_equal(own, before) for own, before in pairs])
    assert (mirrored ^ same).all()
    assert scipy.stats.binomtest(int(mirrored.sum()), 400).pvalue > 0.01


def test_crop_by_hand():
    """Every image is one of the 25 cuts of its padded self, each as often as another."""
    images = np.asarray(numbered(1000))
    cropped = np.asarray(random_crop(jax.random.key(1), images, padding=2))
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    found = np.zeros((5, 5), int)
    for own, whole in zip(cropped, padded, strict=True):
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(own, whole[y : y + 6, x : x + 8])
        ]
        assert len(places) == 1
        found[places[0]] += 1
    assert scipy.stats.chisquare(found.ravel()).pvalue > 0.01
    np.testing.assert_array_equal(random_crop(jax.random.key(1), images, padding=0), images)


def test_erasing_by_hand():
    """A rectangle of the authors' areas and ratios, within the image, of zeros."""
    images = np.asarray(numbered(500, 40, 50))
    erased = np.asarray(random_erasing(jax.random.key(2), images, probability=0.6))
    blank = (erased == 0)[..., 0]
    np.testing.assert_array_equal(np.where(blank[..., None], images, erased), images)
    changed = blank.any((1, 2))
    assert scipy.stats.binomtest(int(changed.sum()), 500, 0.6).pvalue > 0.01
    areas, ratios = [], []
    for mask in blank[changed]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert np.diff(np.flatnonzero(line)).max(initial=1) == 1
        h, w = rows.sum(), columns.sum()
        if h < 40 and w < 50:  # else the side was cut off
            areas.append(h * w / 2000)
            ratios.append(h / w)
    # A side is rounded to a whole pixel, which the smallest ones show.
    assert min(areas) > 0.015
    assert max(areas) < 0.42
    assert min(ratios) > 0.2
    assert max(ratios) < 4.5
    uniform = scipy.stats.uniform(0.02, 0.38)
    assert scipy.stats.kstest(areas, uniform.cdf).statistic < 0.12
    assert abs(np.mean(np.log(ratios))) < 0.1


@pytest.mark.parametrize(
    "change",
    [
        random_flip,
        functools.partial(random_crop, padding=2),
        functools.partial(random_erasing, probability=0.5),
    ],
)
def test_a_change_of_an_image_depends_on_its_place_alone(change):
    images = numbered(16)
    whole = change(jax.random.key(3), images)
    np.testing.assert_array_equal(change(jax.random.key(3), images[:4]), whole[:4])
    np.testing.assert_array_equal(jax.jit(change)(jax.random.key(3), images), whole)
    colour = change(jax.random.key(3), jnp.concatenate([images, 2 * images], axis=-1))
    np.testing.assert_array_equal(colour[..., :1], whole)
    assert not np.array_equal(change(jax.random.key(4), images), whole)


def test_changes_are_each_of_them_in_turn(splits):
    images, key = digits(splits, 8), jax.random.key(5)
    same = random_changes(key, images, rotate=0.0, shift=0.0)
    np.testing.assert_array_equal(same, images)
    affine = random_changes(key, images, **RANGES)
    np.testing.assert_array_equal(affine, random_affine(key, images, **RANGES))
    all_of_them = random_changes(key, images, flip=True, crop=2, erase=0.5, **RANGES)
    flip_key, crop_key, erase_key = (jax.random.fold_in(key, 2**32 - n) for n in (1, 2, 3))
    expected = random_crop(crop_key, random_flip(flip_key, affine), padding=2)
    expected = random_erasing(erase_key, expected, probability=0.5)
    np.testing.assert_array_equal(all_of_them, expected)
