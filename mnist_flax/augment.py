"""Random changes of images: an affine map, a mirror image, a crop, an erased rectangle.

Each is a pure function of a key and of images, of which image `i` depends on `(key, i)` alone.

The affine transform is that of Keras's `ImageDataGenerator` (`get_random_transform` and
`apply_affine_transform` in keras/src/legacy/preprocessing/image.py): the same parameters, units,
signs, centre and order of composition. Two things differ: outside the image everything is 0, which
is MNIST's background, where Keras repeats the edge pixels by default; and a shift is always a
fraction, where Keras takes one from 1 up as pixels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from mnist_flax.errors import InputError


def random_affine(
    key: jax.Array,
    images_BHWC: jax.Array,
    *,
    rotate: jax.typing.ArrayLike = 0.0,
    shift: jax.typing.ArrayLike = 0.0,
    zoom: jax.typing.ArrayLike = 0.0,
    shear: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
    """Transform every image by its own random affine map.

    Image `i` depends on `(key, i)` alone, not on the size of the batch or the devices that hold it
    (though XLA may round the last bit of the matrix otherwise in batches of a few images). The
    draws are float32 whatever the images are, so a key means the same geometry in every precision.
    Ranges of 0 return the images unchanged, bit for bit.

    The ranges may be traced, so that a sweep can `jax.vmap` over them; they are not validated.

    Args:
        key: One PRNG key.
        images_BHWC: Floating-point images [B, H, W, C], 0 meaning background.
        rotate: Largest rotation in degrees: the angle is uniform in [-rotate, rotate).
        shift: Largest shift as a fraction of the image's height (vertically) and of its width
            (horizontally): both are independent and uniform in [-shift, shift).
        zoom: Largest change of scale: the vertical and the horizontal factor are independent and
            uniform in [1 - zoom, 1 + zoom).
        shear: Largest shear angle in degrees: uniform in [-shear, shear).

    Returns:
        The transformed images [B, H, W, C], in the dtype of `images_BHWC`.

    Raises:
        InputError: `images_BHWC` is not a floating-point array of rank 4.
    """
    check_images(images_BHWC)
    batch_size, height, width, _ = images_BHWC.shape
    dtype = jnp.promote_types(images_BHWC.dtype, jnp.float32)

    def draw(index):
        key_i = jax.random.fold_in(key, index)
        return jax.random.uniform(key_i, (6,), jnp.float32, minval=-1.0, maxval=1.0)

    draws_6B = jax.vmap(draw, out_axes=1)(jnp.arange(batch_size)).astype(dtype)
    matrices_B23 = affine_matrix(
        rotate=rotate * draws_6B[0],
        shift_y=shift * draws_6B[1],
        shift_x=shift * draws_6B[2],
        shear=shear * draws_6B[3],
        zoom_y=1 + zoom * draws_6B[4],
        zoom_x=1 + zoom * draws_6B[5],
        height=height,
        width=width,
    )
    return warp_affine(images_BHWC, matrices_B23)


def random_flip(key: jax.Array, images_BHWC: jax.Array) -> jax.Array:
    """Mirror each image from left to right, or leave it, with even chances.

    Args:
        key: One PRNG key.
        images_BHWC: Images [B, H, W, C].

    Returns:
        The images, [B, H, W, C].
    """

    def flip(key, image_HWC):
        return jnp.where(jax.random.bernoulli(key), image_HWC[:, ::-1], image_HWC)

    return jax.vmap(flip)(_keys(key, len(images_BHWC)), images_BHWC)


def random_crop(key: jax.Array, images_BHWC: jax.Array, *, padding: int) -> jax.Array:
    """Pad every image with zeros on all sides and cut its own size out of that, anywhere.

    So it is shifted by whole pixels, up to `padding` either way and each as likely as another
    (He et al. 2016, arXiv 1512.03385, section 4.2).

    Args:
        key: One PRNG key.
        images_BHWC: Images [B, H, W, C], 0 meaning background.
        padding: Pixels on each side, at least 0.

    Returns:
        The images, [B, H, W, C].
    """

    def crop(key, image_HWC):
        padded = jnp.pad(image_HWC, [(padding, padding), (padding, padding), (0, 0)])
        y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (y, x, 0), image_HWC.shape)

    return jax.vmap(crop)(_keys(key, len(images_BHWC)), images_BHWC)


# Random erasing's shares of the image's area and its ratios of height to width, by its authors.
ERASED_AREA = (0.02, 0.4)
ERASED_RATIO = (0.3, 1 / 0.3)


def random_erasing(
    key: jax.Array, images_BHWC: jax.Array, *, probability: jax.typing.ArrayLike
) -> jax.Array:
    """Blank a random rectangle of an image out.

    Its area and the logarithm of its ratio of height to width are uniform, and so is its place,
    within the image where it fits (Zhong et al. 2017, arXiv 1708.04896).

    Args:
        key: One PRNG key.
        images_BHWC: Images [B, H, W, C], 0 meaning background.
        probability: How likely it is that an image is changed, in [0, 1].

    Returns:
        The images, [B, H, W, C].
    """
    _, height, width, _ = images_BHWC.shape

    def erase(key, image_HWC):
        chance, area, ratio, y, x = jax.random.uniform(key, (5,))
        area = (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0])) * height * width
        log_low, log_high = jnp.log(jnp.array(ERASED_RATIO))
        ratio = jnp.exp(log_low + ratio * (log_high - log_low))
        sides = jnp.array([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)])
        (h, w), limits = jnp.round(sides), jnp.array([height, width])
        top, left = jnp.floor(jnp.array([y, x]) * jnp.maximum(limits - jnp.array([h, w]) + 1, 1))
        rows_H1, columns_1W = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
        inside = (rows_H1 >= top) & (rows_H1 < top + h)
        inside &= (columns_1W >= left) & (columns_1W < left + w)
        return jnp.where((inside & (chance < probability))[..., None], 0, image_HWC)

    return jax.vmap(erase)(_keys(key, len(images_BHWC)), images_BHWC)


def random_changes(
    key: jax.Array,
    images_BHWC: jax.Array,
    *,
    flip: bool = False,
    crop: int = 0,
    erase: jax.typing.ArrayLike = 0.0,
    **ranges: jax.typing.ArrayLike,
) -> jax.Array:
    """Change every image by `random_affine`, then the flip, the crop and the erasing.

    Args:
        key: One PRNG key. The affine map is that of `random_affine` with the same one.
        images_BHWC: Floating-point images [B, H, W, C], 0 meaning background.
        flip: Whether to call `random_flip`.
        crop: The padding of `random_crop`; 0 leaves it out.
        erase: The probability of `random_erasing`; a plain 0 leaves it out.
        **ranges: Those of `random_affine`, which is left out where all are a plain 0.

    Returns:
        The changed images [B, H, W, C].
    """
    if any(not _is_zero(value) for value in ranges.values()):
        images_BHWC = random_affine(key, images_BHWC, **ranges)
    # `random_affine` folds in an image's index: these count from the other end.
    if flip:
        images_BHWC = random_flip(jax.random.fold_in(key, 2**32 - 1), images_BHWC)
    if crop:
        images_BHWC = random_crop(jax.random.fold_in(key, 2**32 - 2), images_BHWC, padding=crop)
    if not _is_zero(erase):
        own = jax.random.fold_in(key, 2**32 - 3)
        images_BHWC = random_erasing(own, images_BHWC, probability=erase)
    return images_BHWC


def _is_zero(value: jax.typing.ArrayLike) -> bool:
    return isinstance(value, int | float) and value == 0


def _keys(key: jax.Array, count: int) -> jax.Array:
    """Returns the keys of so many images."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))


def affine_matrix(
    *,
    rotate: jax.typing.ArrayLike = 0.0,
    shift_y: jax.typing.ArrayLike = 0.0,
    shift_x: jax.typing.ArrayLike = 0.0,
    shear: jax.typing.ArrayLike = 0.0,
    zoom_y: jax.typing.ArrayLike = 1.0,
    zoom_x: jax.typing.ArrayLike = 1.0,
    height: int,
    width: int,
) -> jax.Array:
    """Compose rotation, shift, shear and zoom about the centre of the image.

    The matrix maps the (y, x) of an output pixel to the place in the input that it shows. With
    c = ((height - 1) / 2, (width - 1) / 2) that place is R(T(S(Z(output - c)))) + c, where

        R = [cos r, -sin r]   T: + (shift_y * height,   S = [1, -sin s]   Z = [zoom_y, 0]
            [sin r,  cos r]         shift_x * width)        [0,  cos s]       [0, zoom_x]

    As the map runs from output to input, a positive shift moves the content up and left, a factor
    above 1 makes it smaller, and a positive angle turns it clockwise.

    Args:
        rotate: Angle r in degrees.
        shift_y: Vertical shift as a fraction of `height`.
        shift_x: Horizontal shift as a fraction of `width`.
        shear: Angle s in degrees.
        zoom_y: Vertical scale factor.
        zoom_x: Horizontal scale factor.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        Floating-point matrices [..., 2, 3], the columns standing for y, x and 1; the leading axes
        are those of the parameters, each of which is a scalar or has those axes.
    """
    rotation, skew = jnp.deg2rad(rotate), jnp.deg2rad(shear)
    # R S Z, multiplied out: the x axis turns by both angles. Also, a matrix product would be
    # rounded to fewer bits on a GPU or TPU.
    yy, yx = jnp.cos(rotation) * zoom_y, -jnp.sin(rotation + skew) * zoom_x
    xy, xx = jnp.sin(rotation) * zoom_y, jnp.cos(rotation + skew) * zoom_x

    center_y, center_x = (height - 1) / 2, (width - 1) / 2
    pixels_y, pixels_x = shift_y * height, shift_x * width
    offset_y = jnp.cos(rotation) * pixels_y - jnp.sin(rotation) * pixels_x
    offset_x = jnp.sin(rotation) * pixels_y + jnp.cos(rotation) * pixels_x
    offset_y += center_y - yy * center_y - yx * center_x
    offset_x += center_x - xy * center_y - xx * center_x

    entries = jnp.broadcast_arrays(yy, yx, offset_y, xy, xx, offset_x)
    return jnp.stack(entries, axis=-1).reshape(*entries[0].shape, 2, 3)


def warp_affine(images_BHWC: jax.Array, matrices_B23: jax.Array) -> jax.Array:
    """Resample each image along its own affine map.

    Interpolation is bilinear, and everything outside the image is 0: within one pixel of the
    border the value fades to 0. (`scipy.ndimage.affine_transform` calls this order=1,
    mode="grid-constant". Its mode="constant" drops to 0 at once, so a stroke at the edge would
    vanish at the slightest rotation.)

    Args:
        images_BHWC: Floating-point images [B, H, W, C].
        matrices_B23: Floating-point matrices [B, 2, 3] from the (y, x, 1) of an output pixel to
            input coordinates, as `affine_matrix` makes them.

    Returns:
        The resampled images [B, H, W, C], in the dtype of `images_BHWC`.

    Raises:
        InputError: `images_BHWC` is not a floating-point array of rank 4.
    """
    check_images(images_BHWC)
    return jax.vmap(_warp_one)(images_BHWC, matrices_B23)


def _warp_one(image_HWC, matrix_23):
    """Resample one image."""
    height, width, _ = image_HWC.shape
    y_H1 = jnp.arange(height, dtype=matrix_23.dtype)[:, None]
    x_1W = jnp.arange(width, dtype=matrix_23.dtype)[None, :]
    (yy, yx, offset_y), (xy, xx, offset_x) = matrix_23
    coordinates_HW = [yy * y_H1 + yx * x_1W + offset_y, xy * y_H1 + xx * x_1W + offset_x]

    def resample(channel_HW):
        return map_coordinates(channel_HW, coordinates_HW, order=1, mode="constant", cval=0.0)

    return jax.vmap(resample, in_axes=-1, out_axes=-1)(image_HWC)


def check_images(images_BHWC: jax.Array) -> None:
    """Raises InputError unless images are floating-point [B, H, W, C]."""
    if images_BHWC.ndim != 4 or not jnp.issubdtype(images_BHWC.dtype, jnp.floating):
        raise InputError(
            "images must be floating-point [B, H, W, C], not "
            f"{images_BHWC.dtype} {list(images_BHWC.shape)}; convert uint8 with images / 255."
        )
