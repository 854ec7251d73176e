"""Digits in photographs and scans, made into images as MNIST's are.

    read_picture(path)     -> ink_HW      grey in [0, 1], 1 where there is ink, on even ground
    find_digits(ink_HW)    -> [Digit]     left to right

MNIST's digits were scaled into 20x20 pixels, their aspect kept, and centred by their mass in 28x28
(LeCun et al. 1998, "Gradient-based learning applied to document recognition", section III.A).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from mnist_flax.errors import InputError

SIDE, BOX = 28, 20
MAX_SIDE = 800  # pixels of a picture's longer side; larger ones are scaled down first
MIN_SIDE = 112  # smaller ones are scaled up: the smoothing would close the holes of their digits
MIN_CONTRAST = 0.12  # of ink against paper, where 1 is black on white
MIN_STROKE_SIGMAS = 5.0  # of ink against the noise of the paper
STROKE = 0.13  # width of a stroke as a share of the digit's longer side: MNIST's mean
MAX_FILL = 0.72  # a digit's share of its bounding box, where that is not narrow


class NoDigitError(InputError):
    """A picture holds no digit, or not one alone."""


class Digit(NamedTuple):
    """A digit that was found.

    Attributes:
      image_HWC: [28, 28, 1] uint8, as MNIST's.
      box: (top, left, bottom, right) in the picture as it was looked at.
    """

    image_HWC: np.ndarray
    box: tuple[int, int, int, int]


def require_shape(image_shape: tuple[int, int, int]) -> None:
    """Raises InputError unless a network of such images (H, W, C) can read digits."""
    if image_shape != (SIDE, SIDE, 1):
        shape = "x".join(map(str, image_shape))
        raise InputError(f"the run's images are {shape}; digits in pictures become 28x28x1")


def read_picture(path: str | Path) -> np.ndarray:
    """Reads a picture and returns its ink, [H, W] float32 in [0, 1].

    Turns it as its EXIF data says, lays transparency on white, and evens out the light. Light
    writing on dark ground is as good as dark on light. HEIC needs the package pillow-heif.

    Raises:
      InputError: there is no such file, or it is no picture.
      NoDigitError: the picture is blank.
    """
    with contextlib.suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()
    try:
        with Image.open(path) as picture:
            picture.draft("L", (2 * MAX_SIDE, 2 * MAX_SIDE))
            picture = _eight_bits(ImageOps.exif_transpose(picture)).convert("RGBA")
    except FileNotFoundError:
        raise InputError(f"there is no picture {path}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} has too many pixels; scale it down") from None
    except (OSError, ValueError, SyntaxError):
        raise InputError(f"{path} is not a picture that can be read") from None
    paper = Image.new("RGBA", picture.size, "white")
    grey = Image.alpha_composite(paper, picture).convert("L")
    grey.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    if 8 <= max(grey.size) < MIN_SIDE:
        grey = ImageOps.contain(grey, (MIN_SIDE, MIN_SIDE), Image.Resampling.BICUBIC)
    return find_ink(np.asarray(grey, np.float32) / 255)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; `convert` would take all but the darkest 255 for white."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray(np.clip(np.asarray(picture) / 257, 0, 255).astype(np.uint8))


def find_ink(grey_HW: np.ndarray) -> np.ndarray:
    """Returns how much darker (or lighter) than the ground each pixel is, scaled to [0, 1].

    Raises:
      NoDigitError: nothing stands out.
    """
    if min(grey_HW.shape) < 8:
        raise NoDigitError("the picture is smaller than 8 pixels")
    rim = max(1, min(grey_HW.shape) // 20)
    inside = grey_HW[rim:-rim, rim:-rim]
    border = np.concatenate([a.ravel() for a in (grey_HW[:rim], grey_HW[-rim:])])
    ground = np.median(np.append(border, [grey_HW[:, :rim].ravel(), grey_HW[:, -rim:].ravel()]))
    low, high = np.percentile(inside, (0.5, 99.5))
    dark = 1 - grey_HW if ground - low >= high - ground else grey_HW
    # The ground, on a coarse grid: what is left of the picture when strokes are opened away.
    step = max(1, max(grey_HW.shape) // 100)
    smooth = ndimage.gaussian_filter(dark, step / 2)
    coarse = np.asarray(ndimage.zoom(smooth, 1 / step, order=1))
    size = max(3, round(0.3 * min(coarse.shape)))
    opened = ndimage.grey_opening(coarse, size)
    coarse = np.asarray(ndimage.gaussian_filter(opened, size / 4, mode="nearest"))
    paper = np.median(np.concatenate([coarse[[0, -1]].ravel(), coarse[:, [0, -1]].ravel()]))
    if coarse.max() - paper > 0.7 * (np.percentile(dark, 99.5) - paper):
        coarse[:] = paper  # as dark as the writing: a blot, not a shadow
    factors = [n / m for n, m in zip(dark.shape, coarse.shape, strict=True)]
    even = dark - ndimage.zoom(coarse, factors, order=1)
    sigma = max(0.5, max(grey_HW.shape) / 300)
    noise = 1.4826 * np.median(np.abs(even - np.median(even)))
    even = ndimage.gaussian_filter(even, sigma) - np.median(even)
    strongest = np.percentile(even, 99.7)
    if strongest < max(MIN_CONTRAST, MIN_STROKE_SIGMAS * noise / (2 * sigma)):
        raise NoDigitError("the picture is blank: nothing on it stands out")
    return np.clip(even / strongest, 0, 1).astype(np.float32)


def find_digits(ink_HW: np.ndarray) -> list[Digit]:
    """Returns the digits on a line of writing, from left to right.

    Connected strokes are a part; parts one above the other belong to one digit.

    Raises:
      NoDigitError: there is none.
    """
    if not ink_HW.any():
        raise NoDigitError("the picture is blank: there is no ink on it")
    mask_HW = ink_HW > _otsu(ink_HW)
    labelled: Any = ndimage.label(mask_HW, np.ones((3, 3)))
    labels_HW, count = labelled
    boxes = [
        (s[0].start, s[1].start, s[0].stop, s[1].stop) for s in ndimage.find_objects(labels_HW)
    ]
    areas = np.bincount(labels_HW.ravel(), minlength=count + 1)[1:]
    H, W = mask_HW.shape
    inner = [b[0] > 0 and b[1] > 0 and b[2] < H and b[3] < W for b in boxes]
    parts = [i for i in range(count) if inner[i] or not any(inner)]
    tallest = max(
        (max(boxes[i][2] - boxes[i][0], boxes[i][3] - boxes[i][1]) for i in parts), default=0
    )
    if tallest < 0.04 * max(H, W) or tallest < 6:
        raise NoDigitError("nothing on the picture is as large as a digit")
    largest = max(areas[i] for i in parts)
    parts = [i for i in parts if areas[i] >= 0.06 * largest]
    groups = _group(parts, boxes)
    heights = [max(boxes[i][2] for i in g) - min(boxes[i][0] for i in g) for g in groups]
    groups = [g for g, h in zip(groups, heights, strict=True) if h >= 0.35 * max(heights)]
    return [_digit(ink_HW, np.isin(labels_HW, [i + 1 for i in group])) for group in groups]


def find_digit(ink_HW: np.ndarray) -> Digit:
    """Returns the one digit of a picture.

    Raises:
      NoDigitError: there is none, or more than one.
    """
    digits = find_digits(ink_HW)
    if len(digits) > 1:
        raise NoDigitError(f"there are {len(digits)} things on the picture that may be digits")
    return digits[0]


def _otsu(ink_HW):
    """The threshold that parts the values best (Otsu 1979)."""
    counts, edges = np.histogram(ink_HW, 64, (0, 1))
    centers = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * centers)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(np.clip(edges[1:][np.nanargmax(spread)], 0.25, 0.6))


def _group(parts, boxes):
    """Joins parts that overlap, seen from above, by more than a third of the narrower."""
    groups: list[list[int]] = []
    for part in sorted(parts, key=lambda i: boxes[i][1]):
        _, left, _, right = boxes[part]
        for group in groups:
            start, stop = min(boxes[i][1] for i in group), max(boxes[i][3] for i in group)
            shared = min(stop, right) - max(start, left)
            if shared > min(stop - start, right - left) / 3:
                group.append(part)
                break
        else:
            groups.append([part])
    return groups


def _digit(ink_HW, mask_HW):
    """Scales and centres what lies under the mask.

    Raises:
      NoDigitError: it is a blot.
    """
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    longer = max(bottom - top, right - left)
    fill = mask_HW[top:bottom, left:right].mean()
    if fill > MAX_FILL and min(bottom - top, right - left) > 0.5 * longer:
        raise NoDigitError("what stands out on the picture is a blot, not a digit")
    if bottom - top < 0.4 * (right - left):
        raise NoDigitError("what stands out on the picture lies flat, as no digit does")
    pad = longer // 4 + 2
    mask = np.pad(mask_HW[top:bottom, left:right], pad)
    ink = np.pad(ink_HW[top:bottom, left:right], pad) * ndimage.binary_dilation(mask, iterations=2)
    ink, mask = _stroke(ink, mask, longer)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX / max(ink.shape)
    size = [max(1, round(n * scale)) for n in reversed(ink.shape)]
    small = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BOX), np.float32)
    small = np.clip(small / max(np.percentile(small[small > 0.1], 90), 0.3), 0, 1)
    image = np.zeros((SIDE, SIDE), np.float32)
    y, x = np.asarray(ndimage.center_of_mass(small))
    centre = (SIDE - 1) / 2
    at_y = int(np.clip(round(centre - y), 0, SIDE - small.shape[0]))
    at_x = int(np.clip(round(centre - x), 0, SIDE - small.shape[1]))
    image[at_y : at_y + small.shape[0], at_x : at_x + small.shape[1]] = small
    box = (int(top), int(left), int(bottom), int(right))
    return Digit(np.round(255 * image[..., None]).astype(np.uint8), box)


def _stroke(ink, mask, longer):
    """Thickens thin strokes and thins thick ones, towards MNIST's."""
    inside = np.asarray(ndimage.distance_transform_edt(mask))
    # Across a stroke the distance to its edge rises to half the width: its mean is a quarter.
    width = 4 * inside[mask].mean()
    if width < 0.6 * STROKE * longer:
        radius = (0.8 * STROKE * longer - width) / 2
        ink = np.clip(1.5 + radius - ndimage.distance_transform_edt(~mask), 0, 1).astype(np.float32)
    elif width > 1.8 * STROKE * longer:
        thinner = inside > (width - 1.5 * STROKE * longer) / 2
        ink = ndimage.gaussian_filter(thinner.astype(np.float32), 0.5)
    return ink, ink > 0.5 if ink.max() > 0.5 else mask
