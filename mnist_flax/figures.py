"""Every picture, drawn with Matplotlib from plain arrays.

Shapes: E epochs, N examples, M variants, H height, W width, C channels (1 or 3), K classes. Images
are uint8 from 0 to 255, or floating-point from 0 to 1.

Each function returns a `matplotlib.figure.Figure`, which a notebook displays as it is and
`save_figure` writes. None touches pyplot's global state, so they may run in any thread.
"""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

_DPI = 150
_TEXT = 9  # Points, for everything but titles.
# Of the palette of Okabe and Ito, "Color Universal Design" (2008), which those who do not see red
# and green apart can read too. The green is darkened to be legible as text on white.
_GREEN, _RED, _BLUE, _GREY = "#007a5a", "#d55e00", "#0072b2", "#767676"


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure as a PNG: the same figure gives the same bytes, whole or not at all."""
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

    Args:
        epochs: [E] Epoch numbers, ascending.
        train_loss: [E] Mean training loss.
        train_accuracy: [E] Training accuracy, from 0 to 1.
        learning_rate: [E] Learning rate.
        val_loss: [E] Mean validation loss, or None if there is no validation split.
        val_accuracy: [E] Validation accuracy, from 0 to 1, or None.
        best_epoch: The epoch to mark as the best, or None.

    Returns:
        A figure of three axes: loss, accuracy (in percent) and learning rate.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes_loss, axes_accuracy, axes_rate = figure.subplots(1, 3)
    epochs = np.asarray(epochs)
    style = {"marker": "o" if len(epochs) <= 30 else "", "markersize": 4, "linewidth": 1.5}

    for axes, train, val, scale in [
        (axes_loss, train_loss, val_loss, 1),
        (axes_accuracy, train_accuracy, val_accuracy, 100),
    ]:
        axes.plot(epochs, scale * np.asarray(train), color=_BLUE, label="train", **style)
        if val is not None:
            axes.plot(epochs, scale * np.asarray(val), color=_RED, label="val", **style)
    axes_rate.plot(epochs, np.asarray(learning_rate), color=_GREY, **style)
    axes_rate.set_ylim(bottom=0)

    for axes, title in [
        (axes_loss, "Loss"),
        (axes_accuracy, "Accuracy (%)"),
        (axes_rate, "Learning rate"),
    ]:
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if best_epoch is not None:
            label = f"best: epoch {best_epoch}"
            axes.axvline(best_epoch, color=_GREEN, linestyle="--", linewidth=1, label=label)
    axes_loss.legend(fontsize=_TEXT)
    return figure
