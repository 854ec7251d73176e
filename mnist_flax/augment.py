"""Random rotation, shift, shear and zoom of images, in one bilinear resampling.

The transform is that of Keras's `ImageDataGenerator` (`get_random_transform` and
`apply_affine_transform` in keras/src/legacy/preprocessing/image.py): the same parameters, units,
signs, centre and order of composition. Two things differ: outside the image everything is 0, which
is MNIST's background, where Keras repeats the edge pixels by default; and a shift is always a
fraction, where Keras takes one from 1 up as pixels.
"""

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
