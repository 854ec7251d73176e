"""Draw rendered capital letters, 1,040 to train on and 5,200 to test on, as folders of images.

    python experiments/letters.py
    python experiments/train.py --recipe quick --images runs/letters --val-size 0 --epochs 5 \
      --batch-size 52 --optimizer.learning-rate 0.1 --start-from runs/quick-seed0

Matplotlib's own fonts, each letter turned, moved and scaled by chance; the fonts of the test
letters are others than those to train on. It takes five seconds. Expected of the second command:
as in RESULTS.md, from MNIST's weights and without them.
"""

import dataclasses
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line

FONTS = {
    "train": ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmss10"),
    "test": (
        "DejaVuSans-BoldOblique",
        "DejaVuSerif-BoldItalic",
        "STIXGeneralBol",
        "cmr10",
        "cmtt10",
    ),
}
PER_LETTER = {"train": 40, "test": 200}
SIDE = 28  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Options of the script.

    Attributes:
      directory: where the folders train and test go; it must not be there.
    """

    directory: Path = Path("runs/letters")


def draw(letter: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """Returns a white letter on black, up to 20 degrees turned and 3 pixels moved."""
    size = int(rng.integers(60, 84))
    canvas = Image.new("L", (4 * SIDE, 4 * SIDE))
    shift = rng.uniform(-12, 12, 2) + 2 * SIDE
    ImageDraw.Draw(canvas).text(tuple(shift), letter, 255, ImageFont.truetype(font, size), "mm")
    turned = canvas.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    return turned.resize((SIDE, SIDE), Image.Resampling.BOX)


def main(arguments) -> None:
    """Runs the script."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    if command.directory.exists():
        raise InputError(f"{command.directory} is there already; give a new directory")
    for part, names in FONTS.items():
        rng = np.random.default_rng(len(part))
        for letter in string.ascii_uppercase:
            folder = command.directory / part / letter
            folder.mkdir(parents=True)
            for i in range(PER_LETTER[part]):
                draw(letter, fonts / f"{names[i % len(names)]}.ttf", rng).save(
                    folder / f"{i:03}.png"
                )
    print(command.directory)


if __name__ == "__main__":
    command_line.run(main)
