"""Every picture, drawn with Matplotlib from plain arrays.

Shapes: E epochs, N examples, M variants, H height, W width, C channels (1 or 3), K classes. Images
are uint8 from 0 to 255, or floating-point from 0 to 1.

Each function returns a `matplotlib.figure.Figure`: `save_figure` writes it, and a notebook displays
it after `%matplotlib inline`. None touches pyplot's global state, so they may run in any thread.
"""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mnist_flax.workdir import write_bytes

_DPI = 150
_POINTS = 9  # Size of text, but for titles.
# After the palette of Okabe and Ito, "Color Universal Design" (2008), which people who do not tell
# red from green can read too; its green is darkened here to be legible as text on white.
_GREEN, _RED, _BLUE, _GREY = "#007a5a", "#d55e00", "#0072b2", "#767676"


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG: whole or not at all, and the same bytes for the same figure."""
    png = BytesIO()
    # Matplotlib would note its own version in the file.
    figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    write_bytes(Path(path), png.getvalue())


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

    Loss is on a logarithmic scale, and accuracy on one that is logarithmic in the errors: it is
    about as far from 99% to 99.5% as from 98% to 99%.

    Args:
        epochs: [E] Numbers of the epochs, ascending.
        train_loss: [E] Mean loss in training.
        train_accuracy: [E] Accuracy in training, from 0 to 1.
        learning_rate: [E] Learning rate of each epoch's last step.
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
            axes.axvline(best_epoch, color=_GREEN, linestyle="--", zorder=1, label=label)
    loss_axes.legend(fontsize=_POINTS)
    return figure


def plot_predictions(
    *,
    images_NHWC: ArrayLike,
    labels: ArrayLike | None,
    probabilities_NK: ArrayLike,
    class_names: Sequence[str],
    rows: int = 4,
    columns: int = 8,
) -> Figure:
    """Draw the first `rows * columns` images with the class that each was given.

    A right prediction is green; a wrong one is red, bold, and names the true class.

    Args:
        images_NHWC: [N, H, W, C] Images.
        labels: [N] True classes, from 0 to K - 1; None where they are not known.
        probabilities_NK: [N, K] Predicted probabilities.
        class_names: K names.
        rows: Rows of the grid.
        columns: Columns of the grid.

    Returns:
        The figure.
    """
    images = np.asarray(images_NHWC)[: rows * columns]
    probabilities = np.asarray(probabilities_NK)[: rows * columns]
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    titles = [
        f"{class_names[guess]} ({p:.1%})" for guess, p in zip(predicted, confidence, strict=True)
    ]
    if labels is None:
        return _image_grid(images, columns=columns, heading="As read", titles=titles)[0]

    labels = np.asarray(labels)[: rows * columns]
    right = predicted == labels
    titles = [
        title + ("" if hit else f"\ntrue {class_names[label]}")
        for title, label, hit in zip(titles, labels, right, strict=True)
    ]
    heading = f"{right.sum()} of {len(right)} right"
    figure, grid = _image_grid(images, columns=columns, heading=heading, titles=titles)
    for axes, hit in zip(grid, right, strict=True):
        axes.title.set(color=_GREEN if hit else _RED, fontweight="normal" if hit else "bold")
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

    names = np.asarray(class_names)
    titles = [
        f"true {names[labels[i]]} →\npredicted {names[predicted[i]]} ({confidence[i]:.1%})"
        for i in shown
    ]
    heading = f"{_count(len(wrong), 'error')} in {_count(len(labels), 'example')}"
    if len(shown) < len(wrong):
        heading = f"The {len(shown)} most confident of {heading}"
    figure, _ = _image_grid(
        np.asarray(images_NHWC)[shown],
        columns=columns,
        heading=heading,
        titles=titles,
        captions=[f"#{i}" for i in shown],
    )
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
    diagonal = np.eye(len(counts), dtype=bool)
    errors = np.where(diagonal, 0, counts)
    inches, points = (0.5, _POINTS) if len(counts) <= 20 else (0.32, 7)
    side = max(4.5, 2 + inches * len(counts))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()

    # The hits are a thousand times the errors: on one scale no error would be seen.
    shade = 0.85 * errors / max(1, errors.max())
    colors = colormaps["Oranges"](shade)
    colors[errors == 0] = 1
    colors[diagonal] = (0.9, 0.9, 0.9, 1)
    axes.imshow(colors)
    centered = {"ha": "center", "va": "center", "fontsize": points, "in_layout": False}
    for row, column in np.argwhere(counts):
        color = "white" if shade[row, column] > 0.6 else "black"
        axes.text(column, row, f"{counts[row, column]}", color=color, **centered)

    ticks = range(len(counts))
    turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    long_names = max(map(len, class_names)) > 3
    axes.set_xticks(ticks, class_names, fontsize=points, **(turn if long_names else {}))
    axes.set_yticks(ticks, class_names, fontsize=points)
    axes.set(xlabel="predicted", ylabel="true")
    wrong, total = errors.sum(), counts.sum()
    share = f" ({wrong / total:.2%})" if total else ""
    axes.set_title(f"{_count(wrong, 'error')} in {_count(total, 'example')}{share}")
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


def plot_seeds(accuracies: Mapping[str, ArrayLike]) -> Figure:
    """Draw the accuracy of every seed as a point, and each recipe's mean as a line.

    Args:
        accuracies: Recipe name to [S] accuracies from 0 to 1, one for each seed.
    """
    figure = Figure(figsize=(6, 1.2 + 0.7 * len(accuracies)), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(accuracies.values()):
        percent = 100 * np.asarray(values)
        axes.plot(percent, np.full(len(percent), row), "o", color=_BLUE, alpha=0.6, mew=0)
        axes.plot([percent.mean()] * 2, [row - 0.3, row + 0.3], color=_RED)
        label = f"{percent.mean():.3f}"
        axes.annotate(label, (percent.mean(), row + 0.32), ha="center", fontsize=_POINTS)
    axes.set_yticks(range(len(accuracies)), list(accuracies), fontsize=_POINTS)
    axes.set_ylim(-0.6, len(accuracies) - 0.2)
    axes.set_xlabel("Test accuracy (%); the line is the mean", fontsize=_POINTS)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_response(fields: Mapping[str, ArrayLike], *, accuracies: ArrayLike, best: int) -> Figure:
    """Draw the accuracy of a sweep's points against each field that was varied.

    Args:
        fields: Name to [P] values. Positive values that span a factor of 10 get a log axis.
        accuracies: [P] Validation accuracies from 0 to 1.
        best: Index of the point to mark.
    """
    percent = 100 * np.asarray(accuracies)
    figure = Figure(figsize=(3.4 * len(fields) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False, sharey=True)[0]
    for axes, (name, values) in zip(panels, fields.items(), strict=True):
        values = np.asarray(values, np.float64)
        axes.plot(values, percent, "o", color=_BLUE, alpha=0.6, mew=0)
        axes.plot(values[best], percent[best], "o", color=_RED, fillstyle="none", ms=10)
        if values.min() > 0 and values.max() >= 10 * values.min():
            axes.set_xscale("log")
        axes.set_xlabel(name, fontsize=_POINTS)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Validation accuracy (%)", fontsize=_POINTS)
    return figure


def plot_scaling(panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]]) -> Figure:
    """Draw speeds against sizes, both on log axes: the median of several turns, and their range.

    Args:
        panels: What the size counts, to name, to sizes [P] and images a second [P, turns]; one or
            two names a panel.
    """
    figure = Figure(figsize=(3.6 * len(panels) + 0.4, 3.4), layout="constrained")
    axes_P = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (xlabel, lines) in zip(axes_P, panels.items(), strict=True):
        for color, (name, (sizes, speeds)) in zip((_BLUE, _RED), lines.items(), strict=False):
            speeds = np.asarray(speeds, np.float64)
            middle = np.median(speeds, axis=1)
            reach = [middle - speeds.min(axis=1), speeds.max(axis=1) - middle]
            axes.errorbar(sizes, middle, reach, fmt="o-", color=color, label=name, capsize=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(xlabel, fontsize=_POINTS)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=_POINTS)
    axes_P[0].set_ylabel("images a second", fontsize=_POINTS)
    return figure


def plot_reliability(
    *, edges: ArrayLike, confidence: ArrayLike, accuracy: ArrayLike, counts: ArrayLike, title: str
) -> Figure:
    """Draw accuracy against confidence by bin, above a histogram of the confidence.

    Args:
        edges: [B + 1] Limits of the bins of confidence, from 0 to 1.
        confidence: [B] Mean confidence; NaN where a bin is empty.
        accuracy: [B] Share of right predictions; NaN where a bin is empty.
        counts: [B] Examples.
        title: The heading.
    """
    edges = np.asarray(edges)
    figure = Figure(figsize=(4.5, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    upper.plot([0, 1], [0, 1], color=_GREY, linestyle=":")
    upper.plot(confidence, accuracy, "o-", color=_BLUE)
    upper.set(ylabel="accuracy", title=title, ylim=(-0.02, 1.02))
    lower.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BLUE, alpha=0.6)
    lower.set(xlabel="confidence", ylabel="examples", yscale="symlog")
    return figure


def plot_lines(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]], *, xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """Draw named curves.

    Args:
        lines: Name to the curve's x and y, [P] each.
        xlabel: What x is.
        ylabel: What y is.
        title: The heading.
    """
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in lines.items():
        x = np.asarray(x)
        axes.plot(x, np.asarray(y), marker="o" if len(x) < 20 else "", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(lines) > 1:
        axes.legend(fontsize=_POINTS)
    axes.grid(alpha=0.3)
    return figure


def plot_maps(*, images_NHWC: ArrayLike, maps_NHW: ArrayLike, titles: Sequence[str]) -> Figure:
    """Draw images, each above a map of what it is that a network looks at.

    Args:
        images_NHWC: [N, H, W, C] Images.
        maps_NHW: [N, H, W] Maps; each is scaled to its own largest magnitude.
        titles: N headings.
    """
    images, maps = np.asarray(images_NHWC), np.asarray(maps_NHW)
    figure = Figure(figsize=(1.1 * len(images), 2.6), layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False)
    for upper, lower, image, map_HW, title in zip(*grid, images, maps, titles, strict=True):
        _show(upper, image)
        limit = max(np.abs(map_HW).max(), 1e-12)
        lower.imshow(map_HW, cmap="RdBu", vmin=-limit, vmax=limit)
        lower.set(xticks=[], yticks=[])
        upper.set_title(title, fontsize=_POINTS)
    return figure


def plot_filters(filters_NHW: ArrayLike, *, title: str) -> Figure:
    """Draw the kernels of a layer, red negative and blue positive.

    Args:
        filters_NHW: [N, H, W] Kernels, one for each output channel.
        title: The heading.
    """
    filters = np.asarray(filters_NHW)
    columns = min(12, len(filters))
    rows = -(-len(filters) // columns)
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=_POINTS)
    limit = np.abs(filters).max()
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, kernel in zip(figure.axes, filters, strict=False):
        axes.imshow(kernel, cmap="RdBu", vmin=-limit, vmax=limit)
    return figure


def plot_embedding(
    *, points_N2: ArrayLike, labels: ArrayLike, class_names: Sequence[str]
) -> Figure:
    """Draw examples as points in the plane, by class.

    Args:
        points_N2: [N, 2] Places.
        labels: [N] Classes, from 0 to K - 1.
        class_names: K names.
    """
    points, labels = np.asarray(points_N2), np.asarray(labels)
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, name in enumerate(class_names):
        chosen = labels == label
        color = colormaps["tab10"](label % 10)
        axes.plot(*points[chosen].T, ".", ms=2, alpha=0.5, color=color, label=name)
    axes.legend(markerscale=5, fontsize=_POINTS, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xticks=[], yticks=[])
    return figure


def _count(number: int, noun: str) -> str:
    """Format "0 errors", "1 error", "1,234 errors"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _image_grid(
    images: np.ndarray,
    *,
    columns: int,
    heading: str,
    titles: Sequence[str],
    captions: Sequence[str] = (),
) -> tuple[Figure, list[Axes]]:
    """Draw images in rows of `columns`, each below its title and above its caption, if any.

    Returns:
        The figure, and the axes of each image.
    """
    lines = [title.split("\n") for title in titles]
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)

    # In inches. Matplotlib's own layouts let the texts of square axes overlap.
    side, head, character = 1.3, 0.4, 0.075
    above = 0.1 + 0.15 * max((len(each) for each in lines), default=0)
    below = 0.3 if captions else 0.1
    cell_width = max([side + 0.1, *(character * len(line) for each in lines for line in each)])
    cell_height = above + side + below
    width, height = max(5.2, columns * cell_width), head + rows * cell_height

    figure = Figure(figsize=(width, height))
    figure.suptitle(heading, y=1 - 0.5 * head / height, va="center")
    grid = []
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(i, columns)
        x = width / 2 + (column - (columns - 1) / 2) * cell_width - side / 2
        y = height - head - row * cell_height - above - side
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        _show(axes, image)
        axes.set_title(title, fontsize=_POINTS)
        grid.append(axes)
    for axes, caption in zip(grid, captions, strict=False):
        axes.set_xlabel(caption, fontsize=_POINTS, color=_GREY)
    return figure, grid


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

    ticks = [
        t for t in (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 100) if low <= forward(t) <= high
    ]
    few = ticker.MaxNLocator(8, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_locator(ticker.FixedLocator(ticks) if len(ticks) > 2 else few)
    axes.yaxis.set_minor_locator(ticker.NullLocator())
