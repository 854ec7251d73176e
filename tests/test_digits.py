"""Digits in pictures as people take them: drawn, photographed, scanned, or none at all."""

import dataclasses
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import ALL
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from scipy import ndimage

from mnist_flax.errors import InputError
from mnist_flax.evaluation import predict
from mnist_flax.loop import fit
from mnist_flax.recipe import AugmentConfig
from mnist_flax.recipes import RECIPES
from mnist_flax.reports import digits


@pytest.fixture(scope="module")
def state(splits):
    """A network trained for one epoch on a quarter of MNIST, which is enough to read digits."""
    recipe = dataclasses.replace(
        RECIPES["quick"], val_size=5000, batch_size=64, augment=AugmentConfig(rotate=10.0, zoom=0.1)
    )
    part = type(splits.train)(splits.train.images[:15000], splits.train.labels[:15000])
    return fit(recipe, dataclasses.replace(splits, train=part), progress=False).state


def render(image_HW, *, size=400, photograph=False, seed=0):
    """Draws an MNIST image as dark ink on a large light page; or as a photograph of such a page."""
    digit = Image.fromarray(np.asarray(image_HW)).resize((size, size), Image.Resampling.BICUBIC)
    if not photograph:
        return ImageOps.invert(digit)
    rng = np.random.default_rng(seed)
    page = Image.new("L", (2 * size, int(1.5 * size)), 0)
    page.paste(digit, (int(0.7 * size), int(0.3 * size)))
    page = page.transform(
        page.size, Image.Transform.PERSPECTIVE, (1, 0.05, -10, 0.02, 1.05, -12, 5e-5, 8e-5)
    )
    ink = np.asarray(page, np.float32) / 255
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]] / max(ink.shape)
    light = 0.85 - 0.35 * x - 0.15 * y
    grey = light * (1 - 0.75 * ink) + rng.normal(scale=0.02, size=ink.shape)
    rgb = np.stack([grey, 0.97 * grey, 0.9 * grey], -1)
    return Image.fromarray(np.uint8(np.clip(255 * rgb, 0, 255)))


def read(picture, path):
    picture.save(path)
    return digits.find_digit(digits.read_picture(path)).image_HWC


def accuracy(state, pictures, labels, tmp_path, suffix="png"):
    found = []
    for index, picture in enumerate(pictures):
        try:
            found.append(read(picture, tmp_path / f"{index}.{suffix}"))
        except digits.NoDigitError:
            found.append(np.zeros((28, 28, 1), np.uint8))
    return (predict(state, np.stack(found)).argmax(-1) == labels).mean()


@pytest.fixture(scope="module")
def sample(splits):
    images, labels = splits.test.images[:150, :, :, 0], np.asarray(splits.test.labels[:150])
    return images, labels


@pytest.mark.slow
def test_the_test_split_at_400_pixels(state, sample, tmp_path):
    images, labels = (array[: 150 if ALL else 50] for array in sample)
    assert accuracy(state, [render(image) for image in images], labels, tmp_path) >= 0.96


@pytest.mark.slow
def test_photographs(state, sample, tmp_path):
    images, labels = (array[: 60 if ALL else 20] for array in sample)
    pictures = [render(image, photograph=True, seed=i) for i, image in enumerate(images)]
    assert accuracy(state, pictures, labels, tmp_path, "jpg") >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["negative", "transparent", "deep", "turned", "small", "webp", "corner"]
)
def test_the_same_digit_however_it_is_stored(how, state, sample, tmp_path):
    images, labels = sample
    pictures = [render(image) for image in images[:25]]
    suffix, path_accuracy = "png", None
    if how == "negative":
        pictures = [ImageOps.invert(picture) for picture in pictures]
    elif how == "transparent":
        inks = [ImageOps.invert(picture) for picture in pictures]
        pictures = [Image.new("RGBA", ink.size, (40, 20, 90, 0)) for ink in inks]
        for picture, ink in zip(pictures, inks, strict=True):
            picture.putalpha(ink)
    elif how == "deep":
        pictures = [Image.fromarray(np.asarray(p, np.uint16) * 257) for p in pictures]
    elif how == "turned":
        found = []
        for index, picture in enumerate(pictures):
            exif = Image.Exif()
            exif[0x0112] = 6  # turn by 90 degrees clockwise to show
            path = tmp_path / f"{index}.jpg"
            picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
            found.append(digits.find_digit(digits.read_picture(path)).image_HWC)
        path_accuracy = (predict(state, np.stack(found)).argmax(-1) == labels[:25]).mean()
    elif how == "small":
        pictures = [picture.resize((60, 60)) for picture in pictures]
    elif how == "webp":
        suffix = "webp"
    else:
        pictures = [ImageOps.expand(picture, (5, 5, 700, 500), 255) for picture in pictures]
    if path_accuracy is None:
        path_accuracy = accuracy(state, pictures, labels[:25], tmp_path, suffix)
    assert path_accuracy >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 10, 40, 60])
def test_thin_and_thick_pens(width, state, tmp_path):
    right = []
    seven = [(120, 100), (290, 100), (190, 320)]
    one = [(205, 90), (195, 320)]
    four = [(180, 90), (120, 220), (290, 220)]
    for label, strokes in ((7, [seven]), (1, [one]), (4, [four, [(240, 130), (235, 330)]])):
        picture = Image.new("L", (400, 400), 250)
        draw = ImageDraw.Draw(picture)
        for stroke in strokes:
            draw.line(stroke, fill=20, width=width, joint="curve")
        image = read(picture.filter(ImageFilter.GaussianBlur(1)), tmp_path / "pen.png")
        right.append(int(predict(state, image[None]).argmax()) == label)
    assert sum(right) >= 2


@pytest.mark.slow
def test_small_print_keeps_its_holes(state, tmp_path):
    """Where a 4 of 20 pixels was smoothed as it is, it read 2."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 60)
    printed, labels = [], []
    for size, label in itertools.product((20, 24, 28), (0, 4, 6, 8, 9)):
        picture = Image.new("L", (80, 80), 255)
        ImageDraw.Draw(picture).text((20, 4), str(label), fill=0, font=font)
        printed.append(picture.resize((size, size), Image.Resampling.LANCZOS))
        labels.append(label)
    assert accuracy(state, printed, np.array(labels), tmp_path) >= 0.9


def test_it_is_placed_as_mnist_is(sample, tmp_path):
    """The longer side is 20 pixels and the mass is in the middle, on MNIST's own digits."""
    for image in sample[0][:30]:
        found = read(render(image), tmp_path / "digit.png")[:, :, 0]
        rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
        longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert 19 <= longer <= 20
        assert np.abs(np.array(ndimage.center_of_mass(found)) - 13.5).max() < 1.1


@pytest.mark.slow
def test_a_line_of_digits_is_read_in_order(state, sample, tmp_path):
    images, labels = sample
    chosen = [3, 2, 1, 18, 4]
    line = np.zeros((60, 40 * len(chosen) + 20), np.uint8)
    for place, index in enumerate(chosen):
        line[16:44, 10 + 40 * place : 38 + 40 * place] = images[index]
    picture = Image.fromarray(255 - line).resize((1100, 300), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "line.png")
    ink = digits.read_picture(tmp_path / "line.png")
    found = np.stack([digit.image_HWC for digit in digits.find_digits(ink)])
    assert list(predict(state, found).argmax(-1)) == [labels[i] for i in chosen]
    with pytest.raises(digits.NoDigitError, match="5 things"):
        digits.find_digit(ink)


def blank():
    return Image.new("L", (300, 300), 240)


def noisy_page():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:600, :800] / 800
    grey = 0.8 - 0.4 * x - 0.2 * y + rng.normal(scale=0.03, size=(600, 800))
    return Image.fromarray(np.uint8(np.clip(255 * grey, 0, 255)))


def blot():
    picture = blank()
    ImageDraw.Draw(picture).ellipse((80, 80, 220, 220), fill=10)
    return picture


def rule():
    picture = blank()
    ImageDraw.Draw(picture).line((20, 150, 280, 150), fill=10, width=12)
    return picture


def speck():
    picture = blank()
    ImageDraw.Draw(picture).ellipse((150, 150, 155, 155), fill=10)
    return picture


@pytest.mark.parametrize("draw", [blank, noisy_page, blot, rule, speck])
def test_what_holds_no_digit_gets_no_answer(draw, tmp_path):
    with pytest.raises(digits.NoDigitError):
        read(draw(), tmp_path / "none.png")


def test_no_ink_is_no_digit():
    with pytest.raises(digits.NoDigitError, match="blank"):
        digits.find_digits(np.zeros((50, 50), np.float32))


def test_a_network_of_other_images_reads_none():
    digits.require_shape((28, 28, 1))
    with pytest.raises(InputError, match="the run's images are 32x32x3"):
        digits.require_shape((32, 32, 3))


def test_what_is_no_picture_is_one_clear_line(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="not a picture"):
        digits.read_picture(tmp_path / "text.png")
    Image.new("1", (20_000, 9_000)).save(tmp_path / "huge.png")
    with pytest.raises(InputError, match="too many pixels"):
        digits.read_picture(tmp_path / "huge.png")
    with pytest.raises(InputError, match="there is no picture"):
        digits.read_picture(tmp_path / "absent.png")
