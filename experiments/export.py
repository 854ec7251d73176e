"""Export a finished run as StableHLO and ONNX, each checked against it on the whole test split.

    python experiments/export.py runs/default-seed0

Writes export/model.stablehlo and export/model.onnx into the run's directory. ONNX needs
`pip install -e '.[export]'`; without it only StableHLO is written, and the script says so.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mnist_flax import command_line
from mnist_flax.errors import InputError

TOLERANCE = 1e-3  # of logits of about 10, in float32


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      run: a run directory.
      out: where the files go; by default export/ in the run's directory.
      data_dir: TFDS's directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      archives: the directory of IDX archives that the run was trained on, if it was.
    """

    run: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path | None = None
    data_dir: Path | None = None
    archives: Path | None = None

    def __post_init__(self):
        if len(self.run) > 1:
            raise InputError("name one run directory")


def main(arguments):
    """Writes and checks the files; status 1 where one disagrees with the run."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    if not command.run:
        raise InputError("name a run directory; see --help")
    command_line.begin()

    import jax
    import numpy as np

    from mnist_flax import export
    from mnist_flax.data import load_splits
    from mnist_flax.evaluate import predict
    from mnist_flax.results import load_run
    from mnist_flax.workdir import write_bytes

    run = load_run(command.run[0])
    test = load_splits(
        run.recipe.dataset,
        val_size=0,
        seed=0,
        data_dir=command.data_dir,
        archives=command.archives,
    ).test
    images = test.images / np.float32(255)
    expected = predict(run.state, images)
    out = command.out or run.workdir / "export"
    out.mkdir(parents=True, exist_ok=True)
    shape = run.info.image_shape

    def check(path, logits):
        difference = float(np.abs(logits - expected).max())
        same = bool((logits.argmax(-1) == expected.argmax(-1)).all())
        print(
            f"{path}: largest difference of a logit {difference:.1e} on {len(images):,} images, "
            f"predictions {'the same' if same else 'DIFFER'}"
        )
        return same and difference < TOLERANCE

    path = out / "model.stablehlo"
    write_bytes(path, export.to_stablehlo(run.state, image_shape=shape))
    loaded = jax.export.deserialize(bytearray(path.read_bytes()))
    sound = check(path, np.concatenate([loaded.call(part) for part in np.array_split(images, 10)]))
    path = out / "model.onnx"
    try:
        model = export.to_onnx(run.state, image_shape=shape, class_names=run.info.class_names)
        import onnxruntime
    except (InputError, ImportError) as error:
        print(f"no ONNX: {error}", file=sys.stderr)
        return int(not sound)
    write_bytes(path, model)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = [np.asarray(session.run(None, {"images": i})[0]) for i in np.array_split(images, 10)]
    return int(not (check(path, np.concatenate(parts)) and sound))


if __name__ == "__main__":
    command_line.run(main)
