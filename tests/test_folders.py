"""Images of one's own: folders, arrays, archives under other names; and classes of other sizes."""

import dataclasses
import gzip
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import RECIPE, TINY
from PIL import Image
from sklearn import datasets
from test_archives import idx, raw_bytes, refusal

from mnist_flax.data import Splits, balanced_weights, epoch_order
from mnist_flax.datasets import load_splits
from mnist_flax.datasets.archives import FILE_NAMES
from mnist_flax.datasets.folders import load_image_folder, read_image
from mnist_flax.evaluation import evaluate
from mnist_flax.loop import epochs, fit
from mnist_flax.recipe import AugmentConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def draw(directory, colours, *, count, size=(9, 7), first=0):
    """Writes `count` pictures per colour into folders of their names; returns the directory."""
    for name, colour in colours.items():
        (directory / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), colour, np.uint8)
            pixels[0, 0] = first + i  # so that no two are equal
            Image.fromarray(pixels).save(directory / name / f"{i:02}.png")
    return directory


COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200), "white": (255, 255, 255)}


def test_folders_of_classes_by_hand(tmp_path):
    draw(tmp_path / "own" / "train", COLOURS, count=4)
    draw(tmp_path / "own" / "test", {"blue": (0, 0, 200)}, count=2)
    (tmp_path / "own" / "train" / "red" / "notes.txt").write_text("no picture")
    splits = load_image_folder(tmp_path / "own", image_shape=(7, 9, 3), val_size=2)
    assert splits.info.class_names == ("blue", "red", "white")
    assert (splits.info.name, splits.info.num_classes) == ("own", 3)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (10, 2, 2)
    assert splits.train.images.dtype == np.uint8
    assert splits.test.images[0, 3, 3].tolist() == [0, 0, 200]
    for image, label in zip(splits.train.images, splits.train.labels, strict=True):
        assert tuple(image[3, 3]) == COLOURS[splits.info.class_names[label]]
    again = load_image_folder(tmp_path / "own", image_shape=(7, 9, 3), val_size=2)
    assert again.info == splits.info


def test_a_folder_that_is_not_split_is_split_the_same_way_each_time(tmp_path):
    draw(tmp_path, COLOURS, count=10)
    first, second = (load_image_folder(tmp_path, image_shape=(28, 28, 1)) for _ in range(2))
    assert (len(first.train), len(first.test)) == (24, 6)
    assert np.array_equal(first.test.images, second.test.images)
    assert first.train.images.shape == (24, 28, 28, 1)
    both = np.concatenate([first.train.labels, first.test.labels])
    assert np.bincount(both).tolist() == [10, 10, 10]


def test_grey_and_size_are_pillows(tmp_path):
    draw(tmp_path, {"red": (200, 0, 0)}, count=1, size=(20, 20))
    image = read_image(tmp_path / "red" / "00.png", image_shape=(5, 5, 1))
    assert image.shape == (5, 5, 1)
    assert image[3, 3, 0] == 60  # 0.299 of red, as ITU-R 601 weighs it


def test_folders_that_do_not_serve_are_one_line(tmp_path):
    assert "is not a directory" in refusal(load_image_folder, tmp_path / "absent")
    assert "holds 0 folders" in refusal(load_image_folder, tmp_path)
    own = draw(tmp_path / "own" / "train", COLOURS, count=2).parent
    assert "but no test" in refusal(load_image_folder, own)
    draw(own / "test", {"green": (0, 200, 0)}, count=1)
    assert "has the class green, which train lacks" in refusal(load_image_folder, own)
    (own / "train" / "red" / "00.png").write_bytes(b"no picture")
    assert "00.png cannot be read as an image" in refusal(load_image_folder, own)
    assert "give 1 or 3" in refusal(
        read_image, own / "train" / "red" / "01.png", image_shape=(28, 28, 2)
    )


@pytest.mark.slow
def test_the_scripts_train_and_classify_pictures(tmp_path):
    draw(tmp_path / "own" / "train", COLOURS, count=20)
    draw(tmp_path / "own" / "test", COLOURS, count=3, first=100)

    def script(name, *words):
        command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), *map(str, words)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        return run.stdout

    where = ["--images", tmp_path / "own", "--image-shape", 28, 28, 3]
    options = ["--recipe", "quick", "--epochs", 20, "--batch-size", 20, "--workdir", "run"]
    out = script("train", *options, *where)
    assert "test accuracy 100.00% (9/9)" in out
    assert "red" in script("predict", "run", tmp_path / "own" / "test" / "red" / "01.png")
    assert "written to" in script("report", "run", *where)


@pytest.mark.parametrize("form", ["keras", "torch", "sklearn", "names"])
def test_arrays_as_others_hand_them_over(form, splits):
    images, labels = splits.train.images[:60], splits.train.labels[:60]
    train, test = (images[..., 0], labels.astype(np.uint8)), (images[:9], labels[:9, None])
    expected, names = images, tuple("0123456789")
    if form == "torch":  # lists of labels, float32
        train, test = ((images / np.float32(255)), labels.tolist()), (images[:9] / 255, labels[:9])
        expected = images / np.float32(255)
    if form == "sklearn":
        digits = datasets.load_digits()
        train = digits.images / 16, digits.target
        test, expected = (train[0][:9], train[1][:9]), (train[0][..., None]).astype(np.float32)
    if form == "names":  # labels that are not contiguous
        train, test = (images, labels * 10 + 5), (images[:9], labels[:9] * 10 + 5)
        names = tuple(str(10 * label + 5) for label in range(10))
    own = Splits.from_arrays(train, test)
    assert own.info.class_names == names
    assert np.array_equal(own.train.images, expected)
    assert own.train.images.dtype == expected.dtype
    if form != "sklearn":
        assert np.array_equal(own.train.labels, labels)
        assert np.array_equal(own.test.labels, labels[:9])


@pytest.mark.slow
def test_arrays_are_split_and_trained_on(splits):
    arrays = tuple(splits.train[:800])
    own = Splits.from_arrays(
        arrays, tuple(splits.test[:50]), val_size=500, class_names="0123456789"
    )
    assert (len(own.train), len(own.val)) == (300, 500)
    assert next(epochs(RECIPE, own)).row["step"] == 6
    explicit = Splits.from_arrays(arrays, tuple(splits.test[:50]), tuple(splits.val[:500]))
    assert (len(explicit.train), len(explicit.val)) == (800, 500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.transpose(0, 3, 1, 2), y), "images must be"),
        (lambda x, y: (x.astype(np.int32), y), "images must be uint8"),
        (lambda x, y: (x.astype(np.float32), y), r"must lie in [0, 1]"),
        (lambda x, y: (x, np.eye(10)[y]), "labels must be integers"),
        (lambda x, y: (x, y[:-1]), "labels must be integers [30]"),
        (lambda x, y: (x, y + 20), "a label 2"),
        (lambda x, y: (x[:, :20], y), "must be [N, 28, 28, 1]"),
    ],
)
def test_arrays_that_do_not_serve_are_one_line(change, message, splits):
    train = tuple(splits.train[:30])
    assert message in refusal(Splits.from_arrays, train, change(*train))


def test_archives_by_their_names_with_a_dot(tmp_path):
    for name in FILE_NAMES:
        count = 20 if name.startswith("train") else 10
        array = raw_bytes(name).reshape((-1, 28, 28) if "images" in name else -1)[:count]
        (tmp_path / name.replace("-idx", ".idx")).write_bytes(idx(array))
    splits = load_splits("mnist", val_size=0, archives=tmp_path)
    assert (len(splits.train), len(splits.test)) == (20, 10)


def test_emnist_as_it_is_published(tmp_path):
    """On their side, and letters counted from 1; class names are the letters."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (52, 28, 28)).astype(np.uint8)
    labels = np.tile(np.arange(1, 27, dtype=np.uint8), 2)
    for part in ("train", "test"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / f"emnist-letters-{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array)))
    splits = load_splits("emnist/letters", val_size=0, archives=tmp_path)
    assert np.array_equal(splits.train.images[..., 0], images.transpose(0, 2, 1))
    assert np.array_equal(splits.train.labels, labels - 1)
    assert splits.info.class_names[:3] == ("a", "b", "c")
    assert "lacks emnist-balanced-train-images-idx3-ubyte" in refusal(
        load_splits, "emnist/balanced", archives=tmp_path
    )
    assert "in memory" in refusal(load_splits, "emnist/letters", archives=tmp_path, stream=True)


def test_balanced_classes_are_equally_frequent():
    """Each example as often as its weight, rounded one way or the other."""
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    weights = balanced_weights(labels)
    assert weights.sum() == pytest.approx(100, rel=1e-6)
    orders = [
        np.asarray(
            epoch_order(jax.random.key(i), num_examples=100, batch_size=10, weights_N=weights)
        )
        for i in range(3)
    ]
    for order_SB in orders:
        assert order_SB.shape == (10, 10)
        assert np.abs(np.bincount(labels[order_SB.ravel()]) - 100 / 3).max() < 1
        counts = np.bincount(order_SB.ravel(), minlength=100)
        assert np.all((counts >= np.floor(weights)) & (counts <= np.ceil(weights)))
    assert not np.array_equal(orders[0], orders[1])


def test_a_recipe_can_be_balanced(small):
    """Of one class with a tenth of the images, the network sees a half."""
    few = np.flatnonzero(small.train.labels == 1)[:10]
    many = np.flatnonzero(small.train.labels == 0)[:90]
    train = small.train[np.concatenate([few, many])]
    splits = Splits.from_arrays(tuple(train), tuple(train))
    recipe = dataclasses.replace(
        RECIPE,
        val_size=0,
        epochs=1,
        batch_size=20,
        plateau=None,
        model=TINY,
        augment=AugmentConfig(),
    )
    rows = [
        next(epochs(dataclasses.replace(recipe, balance=balance), splits)).row
        for balance in (False, True)
    ]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]


@pytest.mark.slow
def test_colour_images_of_cifars_shape_are_learned(splits):
    """Ten hues on noise, 32 x 32 x 3: cropped, mirrored and erased as CIFAR-10's would be."""
    del splits
    rng = np.random.default_rng(0)
    hues_KC = np.array([[i % 3, i // 3 % 3, i // 9] for i in range(10)]) / 2

    def drawn(count):
        labels_N = rng.integers(0, 10, count)
        noise = rng.uniform(-0.2, 0.2, (count, 32, 32, 3))
        images = np.clip(hues_KC[labels_N][:, None, None] + noise, 0, 1)
        return images.astype(np.float32), labels_N

    own = Splits.from_arrays(drawn(2000), drawn(500))
    recipe = dataclasses.replace(
        RECIPE,
        dataset=own.info.name,
        val_size=0,
        epochs=2,
        plateau=None,
        model=dataclasses.replace(TINY, widths=(8,)),
        augment=AugmentConfig(flip=True, crop=4, erase=0.25),
    )
    result = fit(recipe, own, progress=False)
    assert own.info.image_shape == (32, 32, 3)
    assert evaluate(result.state, own.test).accuracy > 0.95
