"""Every picture, drawn with Matplotlib from plain arrays.

Shapes: E epochs, N examples, M variants, H height, W width, C channels (1 or 3), K classes. Images
are uint8 from 0 to 255, or floating-point from 0 to 1.

Each function returns a `matplotlib.figure.Figure`: `save_figure` writes it, and a notebook displays
it after `%matplotlib inline`. None touches pyplot's global state, so they may run in any thread.
"""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

_DPI = 150
_POINTS = 9  # Size of text, but for titles.
# After the palette of Okabe and Ito, "Color Universal Design" (2008), which people who do not tell
# red from green can read too; its green is darkened here to be legible as text on white.
_GREEN, _RED, _BLUE, _GREY = "#007a5a", "#d55e00", "#0072b2", "#767676"


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG: whole or not at all, and the same bytes for the same figure."""
    path = Path(path)
    png = BytesIO()
    # Matplotlib would note its own version in the file.
    figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(png.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def plot_curves(
    *,
    epochs: ArrayLike,
    train_loss: ArrayLike,
    train_accuracy: ArrayLike,
    learning_rate: ArrayLike,
    val_loss: ArrayLike | None = None,
    val_accuracy: ArrayLike | None = None,
    best_epoch: int | None = None,
) -> Figure:
    """Draw loss, accuracy and learning rate by epoch.

    Loss is on a logarithmic scale, and accuracy on one that is logarithmic in the errors: the step
    from 99% to 99.5% is as long as that from 98% to 99%.

    Args:
        epochs: [E] Numbers of the epochs, ascending.
        train_loss: [E] Mean loss in training.
        train_accuracy: [E] Accuracy in training, from 0 to 1.
        learning_rate: [E] Learning rate.
        val_loss: [E] Mean loss on the validation split, or None where there is none.
        val_accuracy: [E] Accuracy on the validation split, from 0 to 1, or None.
        best_epoch: The epoch to mark as the best, or None.

    Returns:
        A figure of three axes: loss, accuracy in percent, learning rate.
    """
    epochs = np.asarray(epochs)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss_axes, accuracy_axes, rate_axes = figure.subplots(1, 3)
    style = {"marker": "o" if len(epochs) <= 40 else "", "markersize": 4, "linewidth": 1.5}

    curves = [("train", _BLUE, train_loss, train_accuracy)]
    if val_loss is not None and val_accuracy is not None:
        curves.append(("val", _RED, val_loss, val_accuracy))
    for label, color, loss, accuracy in curves:
        loss_axes.plot(epochs, np.asarray(loss), color=color, label=label, **style)
        accuracy_axes.plot(epochs, 100 * np.asarray(accuracy), color=color, label=label, **style)
    rate_axes.plot(epochs, np.asarray(learning_rate), color=_GREY, **style)

    loss_axes.set(title="Loss", yscale="log")
    loss_axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_minor_locator(ticker.NullLocator())
    accuracy_axes.set(title="Accuracy (%)")
    _scale_by_errors(accuracy_axes)
    rate_axes.set(title="Learning rate", ylim=(0, None))

    for axes in (loss_axes, accuracy_axes, rate_axes):
        axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.grid(alpha=0.3)
        if best_epoch is not None:
            label = f"best: epoch {best_epoch}"
            axes.axvline(best_epoch, color=_GREEN, linestyle="--", linewidth=1, label=label)
    loss_axes.legend(fontsize=_POINTS)
    return figure


def plot_predictions(
    *,
    images_NHWC: ArrayLike,
    labels: ArrayLike,
    probabilities_NK: ArrayLike,
    class_names: Sequence[str],
    rows: int = 4,
    columns: int = 8,
) -> Figure:
    """Draw the first `rows * columns` images with the class that each was given.

    A right prediction is green; a wrong one is red, bold, and names the true class.

    Args:
        images_NHWC: [N, H, W, C] Images.
        labels: [N] True classes, from 0 to K - 1.
        probabilities_NK: [N, K] Predicted probabilities.
        class_names: K names.
        rows: Rows of the grid.
        columns: Columns of the grid.

    Returns:
        The figure.
    """
    count = min(len(np.asarray(labels)), rows * columns)
    images, labels = np.asarray(images_NHWC)[:count], np.asarray(labels)[:count]
    probabilities = np.asarray(probabilities_NK)[:count]
    predicted = probabilities.argmax(axis=1)

    figure, grid = _image_grid(count, columns=columns)
    for axes, image, label, guess, row in zip(
        grid, images, labels, predicted, probabilities, strict=True
    ):
        _show(axes, image)
        title = f"{class_names[guess]} ({row[guess]:.1%})"
        if guess == label:
            axes.set_title(title, fontsize=_POINTS, color=_GREEN)
        else:
            title += f"\ntrue: {class_names[label]}"
            axes.set_title(title, fontsize=_POINTS, color=_RED, fontweight="bold")
    figure.suptitle(f"{np.sum(predicted == labels)} of {count} right")
    return figure


def plot_mistakes(
    *,
    images_NHWC: ArrayLike,
    labels: ArrayLike,
    probabilities_NK: ArrayLike,
    class_names: Sequence[str],
    rows: int = 4,
    columns: int = 6,
) -> Figure:
    """Draw the wrongly classified images, the most confident first.

    Args:
        images_NHWC: [N, H, W, C] Images.
        labels: [N] True classes, from 0 to K - 1.
        probabilities_NK: [N, K] Predicted probabilities.
        class_names: K names.
        rows: The most rows to draw.
        columns: Columns of the grid.

    Returns:
        The figure; under each image is its index in `images_NHWC`.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities_NK)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    shown = wrong[np.argsort(-confidence[wrong], kind="stable")][: rows * columns]

    figure, grid = _image_grid(len(shown), columns=columns)
    for axes, index in zip(grid, shown, strict=True):
        _show(axes, np.asarray(images_NHWC)[index])
        true, guess = class_names[labels[index]], class_names[predicted[index]]
        title = f"true {true}\n→ predicted {guess} ({confidence[index]:.1%})"
        axes.set_title(title, fontsize=_POINTS)
        axes.set_xlabel(f"#{index}", fontsize=_POINTS, color=_GREY)
    if len(wrong):
        figure.suptitle(f"{len(shown)} of {len(wrong)} errors in {len(labels):,} examples, ")
    else:
        figure.suptitle(f"No errors in {len(labels):,} examples")
    return figure


def plot_confusion(*, confusion_KK: ArrayLike, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix: the errors in colour, the hits on the diagonal in grey.

    Args:
        confusion_KK: [K, K] Counts of examples, by true class (row) and predicted class (column).
        class_names: K names.

    Returns:
        The figure.
    """
    counts = np.asarray(confusion_KK)
    errors = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    side = 2 + 0.5 * len(counts)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()

    # The hits are a thousand times the errors: on one scale no error would be seen.
    shade = 0.85 * errors / max(1, errors.max())
    colors = colormaps["Oranges"](shade)
    colors[errors == 0] = 1
    np.einsum("iic->ic", colors)[:] = (0.9, 0.9, 0.9, 1)
    axes.imshow(colors)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shade[row, column] > 0.6 else "black"
            axes.text(
                column, row, f"{count}", ha="center", va="center", color=color, fontsize=_POINTS
            )

    ticks = range(len(counts))
    turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    long_names = max(map(len, class_names)) > 3
    axes.set_xticks(ticks, class_names, **(turn if long_names else {}))
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(
        f"{errors.sum():,} errors in {counts.sum():,} examples "
        f"({errors.sum() / max(1, counts.sum()):.2%})"
    )
    return figure


def plot_augmentations(*, originals_NHWC: ArrayLike, augmented_NMHWC: ArrayLike) -> Figure:
    """Draw images, one a row, each followed by variants of it.

    Args:
        originals_NHWC: [N, H, W, C] Images.
        augmented_NMHWC: [N, M, H, W, C] M variants of each.

    Returns:
        The figure.
    """
    originals, augmented = np.asarray(originals_NHWC), np.asarray(augmented_NMHWC)
    rows, columns = len(originals), 1 + augmented.shape[1]
    figure = Figure(figsize=(1.1 * columns, 1.1 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, original, variants in zip(grid, originals, augmented, strict=True):
        for axes, image in zip(row, [original, *variants], strict=True):
            _show(axes, image)
    for axes, title in zip(grid[0], ["original"] + ["augmented"] * (columns - 1), strict=True):
        axes.set_title(title, fontsize=_POINTS)
    return figure


def _image_grid(count: int, *, columns: int) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` axes for images and their titles, in rows of `columns`."""
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(1.4 * columns, 1.65 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.axis("off")
    return figure, list(grid[:count])


def _show(axes: Axes, image_HWC: np.ndarray) -> None:
    """Draw one image, without ticks."""
    scale = 255 if image_HWC.dtype == np.uint8 else 1
    image = np.clip(image_HWC.astype(np.float32) / scale, 0, 1)
    axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _scale_by_errors(axes: Axes) -> None:
    """Scale a y axis of accuracies in percent by the logarithm of the errors."""
    # An error of 0 would be infinitely far up; a tenth of a percent more keeps 100% in sight.
    room = 100.1

    def forward(accuracy):
        return -np.log(np.maximum(room - accuracy, 1e-6))

    def inverse(height):
        return room - np.exp(-height)

    low, high = forward(np.array(axes.dataLim.intervaly))
    margin = max(0.05 * (high - low), 0.05)
    low, high = low - margin, high + margin
    axes.set_yscale("function", functions=(forward, inverse))
    axes.set_ylim(inverse(low), min(inverse(high), 100.05))

    # Round numbers first, as many as fit.
    ticks: list[float] = []
    for step in (50, 10, 5, 1, 0.5, 0.1, 0.05, 0.01):
        for tick in np.arange(0, 100 + step / 2, step).round(2):
            gap = min((abs(forward(tick) - forward(t)) for t in ticks), default=np.inf)
            if low <= forward(tick) <= high and gap > 0.1 * (high - low):
                ticks.append(tick)
    axes.yaxis.set_major_locator(ticker.FixedLocator(sorted(ticks)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
