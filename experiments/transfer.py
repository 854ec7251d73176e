"""Score networks of MNIST on digits of another source, which no recipe was chosen by.

    python experiments/transfer.py default strong runs/quick-seed0

They are scikit-learn's 1,797 digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, UCI "Optical
Recognition of Handwritten Digits", its test part): 43 people's, of Turkey. They are enlarged to 20
x 20, bilinearly, and put into 28 x 28 by their centre of mass, as MNIST's were. That is a weak
test: 8 x 8 pixels blur what a network reads by. Expected: see RESULTS.md. Needs `pip install
scikit-learn`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from mnist_flax.data import Examples
from mnist_flax.errors import InputError
from mnist_flax.launch import command_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Options of the script.

    Attributes:
      runs: run directories, files of weights, or "default" and "strong".
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()


def enlarged(digit_HW: np.ndarray) -> np.ndarray:
    """Returns a digit of 8 x 8 numbers in [0, 16] as an image of MNIST's form, uint8 [28, 28]."""
    small = Image.fromarray(np.round(digit_HW * (255 / 16)).astype(np.uint8))
    ink_HW = np.asarray(small.resize((20, 20), Image.Resampling.BILINEAR))
    places = np.indices(ink_HW.shape).reshape(2, -1)
    middle = (places * ink_HW.ravel()).sum(1) / ink_HW.sum()
    top, left = np.clip(np.round(13.5 - middle).astype(int), 0, 8)
    image_HW = np.zeros((28, 28), np.uint8)
    image_HW[top : top + 20, left : left + 20] = ink_HW
    return image_HW


def load() -> Examples:
    """Returns the digits, images [1797, 28, 28, 1] uint8 and labels.

    Raises:
      InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits need scikit-learn: pip install scikit-learn") from None
    digits: Any = load_digits()
    images_NHW = np.stack([enlarged(digit_HW) for digit_HW in digits.images])
    return Examples(images_NHW[..., None], digits.target.astype(np.int32))


def main(arguments) -> None:
    """Runs the script."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    if not command.runs:
        raise InputError("name at least one run; see --help")
    examples = load()
    command_line.begin()

    from mnist_flax.evaluation import evaluate
    from mnist_flax.reports.calibration import wilson_interval
    from mnist_flax.reports.runs import load_run

    for path in command.runs:
        run = load_run(path)
        if run.info.name != "mnist":
            raise InputError(f"{path} was trained on {run.info.name}, not on mnist")
        test = evaluate(run.state, examples)
        low, high = wilson_interval(test.correct, test.total)
        print(f"{path}: {test.accuracy:.2%} of {test.total:,} ({low:.2%} to {high:.2%})")


if __name__ == "__main__":
    command_line.run(main)
