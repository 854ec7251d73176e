"""Read the digit on each of some pictures: photographs, scans, drawings.

    python experiments/predict.py digit.png photo.jpg
    python experiments/predict.py runs/quick-seed0 digit.png

The first reads with the weights of `default`, which come with the package.
Prints a line a picture: the digit, its probability, and the runner-up. `--line` reads several
digits in a row; `--show out.png` draws what was made of the pictures; `--json` prints JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line
from mnist_flax.workdir import require_directory

STRANGE = "; but it is nothing like what the network was trained on"


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      paths: a run's directory or weights, if not "default", then pictures; options stand before or
        after all of them.
      line: read several digits on one line, in order.
      show: a PNG file to draw what the network saw into.
      json: print JSON instead of text.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    line: bool = False
    show: Path | None = None
    json: bool = False


def read(path: Path, info, *, line: bool):
    """Returns what there is to classify in a picture, [N, H, W, C].

    Of a network that was trained on folders of images, the picture itself, as those were read; of
    others, which know digits and their like, the ink that is found in it.
    """
    import numpy as np

    from mnist_flax.datasets.folders import VERSION, read_image
    from mnist_flax.reports import digits

    if info.version == VERSION:
        return read_image(path, image_shape=info.image_shape)[None]
    ink = digits.read_picture(path)
    found = digits.find_digits(ink) if line else [digits.find_digit(ink)]
    return np.stack([digit.image_HWC for digit in found])


def answer(probabilities_K, names, distance: float | None) -> dict[str, Any]:
    """Returns a digit, its probability and the runner-up's, as JSON.

    And, where the run knows, how far it is from what the network was trained on: above 1 it is
    nothing like that (`mnist_flax.reports.familiarity`).
    """
    second, first = probabilities_K.argsort()[-2:]
    known = {} if distance is None else {"distance": distance, "familiar": distance <= 1}
    return known | {
        "label": names[first],
        "probability": float(probabilities_K[first]),
        "runner_up": names[second],
        "runner_up_probability": float(probabilities_K[second]),
    }


def main(arguments):
    """Reads the pictures and prints the answers; status 1 where one has no digit."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    if not command.paths:
        raise InputError("name at least one picture; see --help")
    if command.show is not None and command.show.is_dir():
        raise InputError(f"show is {command.show}, a directory; name a PNG file")
    if command.show is not None:
        require_directory(command.show.parent, "show's directory")
    command_line.begin()

    import numpy as np

    from mnist_flax.datasets.folders import VERSION
    from mnist_flax.evaluation import Evaluation, predict
    from mnist_flax.reports import familiarity
    from mnist_flax.reports.digits import require_shape
    from mnist_flax.reports.figures import plot_predictions, save_figure
    from mnist_flax.reports.runs import is_run, load_run

    named, pictures = ("default",), command.paths
    if is_run(pictures[0]):
        named, pictures = pictures[:1], pictures[1:]
    if not pictures:
        raise InputError("name at least one picture; see --help")
    run = load_run(named[0])
    print(run, file=sys.stderr)
    if run.info.version != VERSION:
        require_shape(run.info.image_shape)
    names, known = run.info.class_names, run.familiarity
    images, probabilities, answers = [], [], []
    for path in pictures:
        try:
            found = read(path, run.info, line=command.line)
        except InputError as error:
            answers.append({"picture": str(path), "error": str(error)})
            continue
        logits_NK = predict(run.state, found)
        evaluation = Evaluation(logits_NK, np.zeros(len(found), np.int32))
        images.append(found)
        probabilities.append(evaluation.probabilities_NK)
        distances = [None] * len(found)
        if known is not None:
            distances = known.distances(familiarity.measurements(run.state, found)).tolist()
        pairs = zip(evaluation.probabilities_NK, distances, strict=True)
        digits = [answer(row, names, distance) for row, distance in pairs]
        answers.append({"picture": str(path), "digits": digits})
    if command.show is not None and images:
        shown = np.concatenate(probabilities)
        figure = plot_predictions(
            images_NHWC=np.concatenate(images),
            labels=None,
            probabilities_NK=shown,
            class_names=names,
            columns=min(8, len(shown)),
            rows=-(-len(shown) // 8),
        )
        command.show.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, command.show)
    if command.json:
        print(json.dumps(answers, indent=2))
    for entry in [] if command.json else answers:
        if "error" in entry:
            print(f"{entry['picture']}: {entry['error']}", file=sys.stderr)
            continue
        for digit in entry["digits"]:
            strange = "" if digit.get("familiar", True) else STRANGE
            print(
                f"{entry['picture']}: {digit['label']} ({digit['probability']:.1%}), "
                f"or {digit['runner_up']} ({digit['runner_up_probability']:.1%}){strange}"
            )
    return int(any("error" in entry for entry in answers))


if __name__ == "__main__":
    command_line.run(main)
