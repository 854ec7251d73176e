"""Each figure shows the numbers that it was given: texts, curves, colours and limits."""

import concurrent.futures
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from mnist_flax.reports import figures

DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
NUMBERS = tuple(f"class number {k}" for k in range(10))


def probabilities(predicted, confidence):
    """Give `confidence` to one class of ten, and share the rest among the others."""
    confidence = np.asarray(confidence, np.float64)
    rows = np.repeat((1 - confidence)[:, None] / 9, 10, axis=1)
    rows[np.arange(len(rows)), predicted] = confidence
    return rows


def drawn_texts(figure):
    """List the texts that are drawn: of ticks, those within the axes' limits."""
    yield from figure.texts
    for axes in figure.axes:
        yield from [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        if axes.get_legend() is not None:
            yield from axes.get_legend().get_texts()
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            yield from [label for place, label in labels if low <= place <= high]


def assert_readable(figure):
    """Assert that no two texts overlap, and that none is cut off by the figure's edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in drawn_texts(figure) if text.get_text()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    width, height = canvas.get_width_height()
    for text, box in zip(texts, boxes, strict=True):
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text

    # The box of a slanted text is mostly empty: such boxes may overlap.
    upright = [i for i, text in enumerate(texts) if not text.get_rotation()]
    x0, y0, x1, y1 = np.array([boxes[i].extents for i in upright])[:, :, None].transpose(1, 0, 2)
    left, below = x0 < x1.T, y0 < y1.T  # [i, j]: box i begins before box j ends.
    overlaps = np.argwhere(np.triu(left & left.T & below & below.T, k=1))
    assert not [(texts[upright[i]], texts[upright[j]]) for i, j in overlaps]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def series(axes, line):
    return np.asarray(axes.lines[line].get_ydata())


def pixels(axes):
    return np.asarray(axes.images[0].get_array())


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curves(count, **changes):
    epochs = np.arange(1, count + 1)
    return {
        "epochs": epochs,
        "train_loss": 0.3 / epochs,
        "val_loss": 0.1 + 0.1 / epochs,
        "train_accuracy": 1 - 0.1 / epochs,
        "val_accuracy": 0.994 - 0.02 / epochs,
        "learning_rate": 1e-3 * 0.5**epochs,
        **changes,
    }


# --- plot_curves


def test_curves_show_every_series():
    figure = figures.plot_curves(**curves(5), best_epoch=4)
    loss, accuracy, rate = figure.axes
    assert titles(figure) == ["Loss", "Accuracy (%)", "Learning rate"]
    assert legend(loss) == ["train", "val", "best: epoch 4"]
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(series(loss, 0), [0.3, 0.15, 0.1, 0.075, 0.06])
    np.testing.assert_allclose(series(loss, 1), [0.2, 0.15, 0.4 / 3, 0.125, 0.12])
    np.testing.assert_allclose(series(accuracy, 0), [90, 95, 290 / 3, 97.5, 98])
    np.testing.assert_allclose(series(accuracy, 1), [97.4, 98.4, 99.4 - 2 / 3, 98.9, 99.0])
    np.testing.assert_allclose(series(rate, 0)[:2], [5e-4, 2.5e-4])
    for axes in figure.axes:
        np.testing.assert_array_equal(axes.lines[-1].get_xdata(), [4, 4])


def test_curves_without_validation():
    figure = figures.plot_curves(**curves(5, val_loss=None, val_accuracy=None))
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1]
    assert legend(figure.axes[0]) == ["train"]


@pytest.mark.parametrize("count", [1, 2, 12, 200])
def test_curves_of_few_and_many_epochs(count):
    figure = figures.plot_curves(**curves(count), best_epoch=1)
    assert_readable(figure)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert low < 1 <= count < high
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
        # A single point is invisible as a line.
        assert (axes.lines[0].get_marker() == "o") == (count <= 40)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.92, 0.9991, [95, 98, 99, 99.5, 99.8, 99.9]),
        (0.98, 1.0, [98, 99, 99.5, 99.8, 99.9, 100]),
        (0.12, 0.9, [50, 80, 90]),
    ],
)
def test_accuracy_ticks_grow_denser_towards_100(low, high, expected):
    accuracy = np.linspace(low, high, 30)
    axes = figures.plot_curves(**curves(30, train_accuracy=accuracy, val_accuracy=accuracy)).axes[1]
    np.testing.assert_array_equal(axes.get_yticks(), expected)
    bottom, top = axes.get_ylim()
    assert bottom < 100 * low < 100 * high < top <= 100.05
    # In the picture, from 99% to 99.5% is about as far as from 98% to 99%.
    y = axes.transData.transform([(1, 98), (1, 99), (1, 99.5)])[:, 1]
    assert 0.9 < (y[2] - y[1]) / (y[1] - y[0]) < 1.0


@pytest.mark.parametrize(
    ("low", "high"), [(0.9931, 0.9947), (0.6, 0.62), (1.0, 1.0), (0.1, 0.1), (0.0, 0.0)]
)
def test_accuracies_close_together_have_ticks_too(low, high):
    accuracy = np.linspace(low, high, 30)
    figure = figures.plot_curves(**curves(30, train_accuracy=accuracy, val_accuracy=accuracy))
    bottom, top = figure.axes[1].get_ylim()
    assert bottom < 100 * low <= 100 * high < top
    assert any(bottom <= tick <= top for tick in figure.axes[1].get_yticks())
    assert_readable(figure)


# --- plot_predictions and plot_mistakes


def test_predictions_name_class_and_probability(splits):
    figure = figures.plot_predictions(
        images_NHWC=splits.test.images[:3],
        labels=np.array([7, 2, 1]),
        probabilities_NK=probabilities([7, 3, 1], [0.987, 0.5, 1.0]),
        class_names=DIGITS,
    )
    assert titles(figure) == ["7 (98.7%)", "3 (50.0%)\ntrue 2", "1 (100.0%)"]
    assert figure.get_suptitle() == "2 of 3 right"
    right, wrong, _ = [axes.title for axes in figure.axes]
    assert right.get_color() != wrong.get_color()
    assert (right.get_fontweight(), wrong.get_fontweight()) == ("normal", "bold")
    np.testing.assert_allclose(
        pixels(figure.axes[0]), splits.test.images[0, :, :, 0] / np.float32(255)
    )


def test_predictions_without_labels_are_not_judged(splits):
    figure = figures.plot_predictions(
        images_NHWC=splits.test.images[:2],
        labels=None,
        probabilities_NK=np.array([[0.9, 0.1], [0.25, 0.75]]),
        class_names=("zero", "one"),
    )
    assert figure.get_suptitle() == "As read"
    assert [axes.get_title() for axes in figure.axes] == ["zero (90.0%)", "one (75.0%)"]
    assert {axes.title.get_color() for axes in figure.axes} == {"black"}


def test_predictions_fill_the_grid_row_by_row(splits):
    count = 9
    figure = figures.plot_predictions(
        images_NHWC=splits.test.images[:count],
        labels=np.arange(count),
        probabilities_NK=probabilities(np.arange(count), np.full(count, 0.9)),
        class_names=DIGITS,
        rows=2,
        columns=4,
    )
    assert titles(figure) == [f"{k} (90.0%)" for k in range(8)]
    left = [axes.get_position().x0 for axes in figure.axes]
    top = [axes.get_position().y1 for axes in figure.axes]
    assert left[:4] == left[4:] == sorted(left[:4])
    assert len(set(top[:4])) == len(set(top[4:])) == 1
    assert top[0] > top[4]


def test_mistakes_are_sorted_by_confidence(splits):
    labels = np.array([0, 1, 2, 3, 4, 5])
    predicted = np.array([0, 7, 2, 5, 9, 5])  # Examples 1, 3 and 4 are wrong.
    figure = figures.plot_mistakes(
        images_NHWC=splits.test.images[:6],
        labels=labels,
        probabilities_NK=probabilities(predicted, [0.99, 0.6, 0.99, 0.4, 0.991, 0.99]),
        class_names=DIGITS,
    )
    assert titles(figure) == [
        "true 4 →\npredicted 9 (99.1%)",
        "true 1 →\npredicted 7 (60.0%)",
        "true 3 →\npredicted 5 (40.0%)",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["#4", "#1", "#3"]
    assert figure.get_suptitle() == "3 errors in 6 examples"
    for axes, index in zip(figure.axes, [4, 1, 3], strict=True):
        expected = splits.test.images[index, :, :, 0] / np.float32(255)
        np.testing.assert_allclose(pixels(axes), expected)


def test_only_the_most_confident_mistakes_are_drawn(splits):
    confidence = np.linspace(0.5, 0.9, 20)
    figure = figures.plot_mistakes(
        images_NHWC=splits.test.images[:20],
        labels=np.zeros(20, np.int32),
        probabilities_NK=probabilities(np.ones(20, np.int32), confidence),
        class_names=DIGITS,
        rows=1,
        columns=2,
    )
    assert [axes.get_xlabel() for axes in figure.axes] == ["#19", "#18"]
    assert figure.get_suptitle() == "The 2 most confident of 20 errors in 20 examples"


def test_no_mistakes_says_so(splits):
    labels = splits.test.labels
    figure = figures.plot_mistakes(
        images_NHWC=splits.test.images,
        labels=labels,
        probabilities_NK=probabilities(labels, np.full(len(labels), 0.9)),
        class_names=DIGITS,
    )
    assert not figure.axes
    assert figure.get_suptitle() == "0 errors in 10,000 examples"


@pytest.mark.parametrize("draw", [figures.plot_predictions, figures.plot_mistakes])
@pytest.mark.parametrize("names", [DIGITS, GARMENTS])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_image_grids_are_readable(splits, draw, names, count):
    labels = splits.test.labels[:count]
    figure = draw(
        images_NHWC=splits.test.images[:count],
        labels=labels,
        probabilities_NK=probabilities((labels + 9) % 10, np.linspace(0.2, 1, count)),
        class_names=names,
    )
    assert_readable(figure)
    width, height = figure.get_size_inches()
    assert width <= 16
    assert height <= 10


# --- plot_confusion


def test_confusion_counts():
    figure = figures.plot_confusion(
        confusion_KK=np.array([[980, 3, 0], [0, 1130, 5], [1, 0, 1030]]), class_names="012"
    )
    (axes,) = figure.axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}  # (column, row)
    assert texts == {
        (0, 0): "980",
        (1, 0): "3",
        (1, 1): "1130",
        (2, 1): "5",
        (0, 2): "1",
        (2, 2): "1030",
    }
    assert axes.get_title() == "9 errors in 3,149 examples (0.29%)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_confusion_colours_tell_errors_apart_beside_a_full_diagonal():
    counts = np.diag([1000, 1000, 1000])
    counts[0, 1], counts[1, 2] = 1, 4
    (axes,) = figures.plot_confusion(confusion_KK=counts, class_names="012").axes
    colors = pixels(axes)[:, :, :3]
    brightness = colors.mean(axis=-1)
    assert to_hex(colors[2, 0]) == "#ffffff"  # No error.
    assert brightness[0, 1] > brightness[1, 2] + 0.2  # One error, and four.
    diagonal = colors[[0, 1, 2], [0, 1, 2]]
    assert np.all(diagonal == diagonal[0, 0])  # The same grey.


@pytest.mark.parametrize(
    "names", [DIGITS, GARMENTS, ("zero", "one"), NUMBERS, tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")]
)
def test_confusion_is_readable(names):
    count = len(names)
    counts = np.random.default_rng(0).poisson(2, (count, count)) + np.diag([1000] * count)
    figure = figures.plot_confusion(confusion_KK=counts, class_names=names)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(names)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(names)
    assert_readable(figure)


def test_confusion_of_nothing_is_drawn_without_warning():
    figure = figures.plot_confusion(confusion_KK=np.zeros((3, 3), np.int32), class_names="012")
    assert titles(figure) == ["0 errors in 0 examples"]


# --- plot_augmentations and images


def test_augmentations_show_the_original_then_its_variants(splits):
    originals = splits.train.images[:2]
    augmented = np.stack([np.roll(originals, 1, axis=1), np.roll(originals, 2, axis=1)], axis=1)
    figure = figures.plot_augmentations(originals_NHWC=originals, augmented_NMHWC=augmented)
    assert titles(figure) == ["original", "augmented", "augmented", "", "", ""]
    expected = [originals[0], *augmented[0], originals[1], *augmented[1]]
    for axes, image in zip(figure.axes, expected, strict=True):
        np.testing.assert_allclose(pixels(axes), image[:, :, 0] / np.float32(255))
    assert_readable(figure)


def test_bytes_and_floats_and_colour_look_the_same(splits):
    gray = splits.train.images[:1]
    color = np.repeat(gray, 3, axis=-1)

    def drawn(images):
        figure = figures.plot_augmentations(originals_NHWC=images, augmented_NMHWC=images[:, None])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())

    expected = drawn(gray)
    np.testing.assert_array_equal(drawn(gray / np.float32(255)), expected)
    # Matplotlib maps grey and colour to bytes by roundings of its own.
    np.testing.assert_allclose(drawn(color).astype(int), expected, rtol=0, atol=1)
    np.testing.assert_array_equal(drawn(color / np.float64(255)), drawn(color))


def test_brightness_is_absolute():
    image = np.array([[-0.5, 0.0], [1.0, 1.5]]).reshape(1, 2, 2, 1)
    dim = np.full((1, 2, 2, 1), 0.25)
    figure = figures.plot_augmentations(originals_NHWC=image, augmented_NMHWC=dim[:, None])
    np.testing.assert_array_equal(pixels(figure.axes[0]), [[0, 0], [1, 1]])
    np.testing.assert_array_equal(pixels(figure.axes[1]), [[0.25, 0.25], [0.25, 0.25]])
    assert [axes.images[0].get_clim() for axes in figure.axes] == [(0, 1), (0, 1)]


# --- save_figure


def test_the_same_figure_has_the_same_bytes(tmp_path):
    for name in ("first.png", "second.png"):
        figures.save_figure(figures.plot_curves(**curves(5)), tmp_path / name)
    first = (tmp_path / "first.png").read_bytes()
    assert first == (tmp_path / "second.png").read_bytes()
    with Image.open(BytesIO(first)) as image:
        assert image.format == "PNG"
        assert image.size == (1800, 540)
        assert set(image.info) == {"dpi"}  # Neither date nor version.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", "second.png"]


def test_whoever_reads_while_a_figure_is_saved_sees_the_old_one_whole(tmp_path):
    path = tmp_path / "curves.png"
    path.write_text("old")
    with path.open("rb") as reader:
        figures.save_figure(figures.plot_curves(**curves(5)), str(path))
        assert reader.read() == b"old"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "curves.png"
    path.write_text("old")
    figure = figures.plot_curves(**curves(5))
    figure.axes[0].set_title("$\\no_such_symbol$")  # Which Matplotlib refuses only as it draws.
    with pytest.raises(ValueError, match="no_such_symbol"):
        figures.save_figure(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_cannot_replace_leaves_nothing_behind(tmp_path):
    path = tmp_path / "curves.png"
    path.mkdir()
    with pytest.raises(OSError, match="curves"):
        figures.save_figure(figures.plot_curves(**curves(5)), path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_threads_draw_the_same_bytes(tmp_path):
    def draw(i):
        figures.save_figure(figures.plot_curves(**curves(5 + i % 2)), tmp_path / f"{i}.png")
        return (tmp_path / f"{i}.png").read_bytes()

    expected = [draw(0), draw(1)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        drawn = list(threads.map(draw, range(2, 6)))
    assert drawn == expected * 2


def test_pyplot_is_not_imported(tmp_path):
    program = (
        "import sys\n"
        "from mnist_flax.reports import figures\n"
        "figure = figures.plot_confusion(confusion_KK=[[2, 1], [0, 3]], class_names='01')\n"
        "figures.save_figure(figure, sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "confusion.png"], check=True)
    assert (tmp_path / "confusion.png").exists()


# --- plot_response


def test_response_shows_every_point_and_marks_the_best():
    fields = {"rate": [0.01, 0.1, 1.0], "rotate": [0.0, 5.0, 10.0]}
    left, right = figures.plot_response(fields, accuracies=[0.5, 0.9, 0.7], best=1).axes
    for axes, values in zip((left, right), fields.values(), strict=True):
        points, best = axes.lines
        np.testing.assert_allclose(points.get_xdata(), values)
        np.testing.assert_allclose(points.get_ydata(), [50, 90, 70])
        assert best.get_xydata().tolist() == [[values[1], 90]]
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert (left.get_xlabel(), right.get_xlabel()) == ("rate", "rotate")


# --- plot_scaling


def test_scaling_shows_the_median_and_the_range_of_the_turns():
    lines = {
        "loop": ([1, 4], [[10.0, 30.0, 20.0], [5.0, 5.0, 8.0]]),
        "vmap": ([2], [[7.0, 7.0, 7.0]]),
    }
    (axes,) = figures.plot_scaling({"replicas": lines}).axes
    first, second = (container.lines for container in axes.containers)
    assert first[0].get_xydata().tolist() == [[1, 20], [4, 5]]
    assert second[0].get_xydata().tolist() == [[2, 7]]
    spans = [segment[:, 1].tolist() for segment in first[2][0].get_segments()]
    assert spans == [[10, 30], [5, 8]]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_legend().texts] == ["loop", "vmap"]
