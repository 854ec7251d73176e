"""Export a run as StableHLO, ONNX and weights, each checked against it on the test split.

    python experiments/export.py runs/default-seed0

Writes model.stablehlo, model.onnx and weights.safetensors into the run's export/; what fails its
check is not written. `load_run` and the scripts take the weights in place of the run. ONNX needs
`pip install -e '.[export]'`; without it the others are written, and the script says so. ONNX
computes in float32, a network of bfloat16 too.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line, options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.Dataset):
    """Options of the script.

    Attributes:
      run: a run's directory, or its weights.
      out: where the files go; by default export/ in the run's directory.
      half: round the weights to 16 bits.
      archives: the directory of IDX archives that the run was trained on, if it was.
    """

    run: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path | None = None
    half: bool = False

    def __post_init__(self):
        if len(self.run) > 1:
            raise InputError("name one run directory")


def run_weights(data: bytes, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns the logits [N, K] of packed weights."""
    from mnist_flax.evaluation import predict
    from mnist_flax.reports.runs import unpack_weights

    return predict(unpack_weights(data, name="the weights").state, images_NHWC)


def write_checked(
    path: Path,
    make: Callable[[], bytes],
    run: Callable[[bytes, np.ndarray], np.ndarray],
    *,
    images_NHWC: np.ndarray,
    expected_NK: np.ndarray,
    tolerance: float,
) -> bool:
    """Makes a file, compares its logits with those expected, and writes it if they agree.

    Returns:
      Whether they did.

    Raises:
      ImportError: a package for it is not installed.
    """
    from mnist_flax.workdir import write_bytes

    try:
        data = make()
        logits_NK = run(data, images_NHWC)
    except (ImportError, InputError):
        raise
    except Exception as error:  # of other packages, which have many kinds
        reason = next(iter(str(error).splitlines()), "")
        print(f"error: {path} is not written: {type(error).__name__}: {reason}", file=sys.stderr)
        return False
    difference = float(np.abs(logits_NK - expected_NK).max())
    others = int((logits_NK.argmax(-1) != expected_NK.argmax(-1)).sum())
    found = (
        f"largest difference of a logit {difference:.1e} on {len(images_NHWC):,} images, "
        f"predictions {f'of {others} other' if others else 'the same'}"
    )
    if not difference < tolerance:
        print(f"error: {path} is not written: {found}", file=sys.stderr)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    print(f"{path}: {found}")
    return True


def main(arguments):
    """Checks and writes the files; status 1 where one disagrees with the run."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    if not command.run:
        raise InputError("name a run directory; see --help")
    command_line.begin()

    from mnist_flax.evaluation import predict
    from mnist_flax.reports import export
    from mnist_flax.reports.runs import load_run, pack_weights
    from mnist_flax.workdir import require_directory

    run = load_run(command.run[0])
    print(run, file=sys.stderr)
    if command.out is None and run.workdir.is_file():
        raise InputError(f"{run.workdir} is no directory of a run; give --out")
    out = command.out or run.workdir / "export"
    require_directory(out, "out")
    splits = command.load(run.recipe, val_size=0)
    if splits.info.fingerprint != run.info.fingerprint:
        raise InputError(f"{run.workdir} was trained on other data; give its --archives")
    shape, names = run.info.image_shape, run.info.class_names
    images_NHWC = np.asarray(splits.test.images) / np.float32(255)
    expected_NK = predict(run.state, images_NHWC)
    check = functools.partial(
        write_checked,
        images_NHWC=images_NHWC,
        expected_NK=expected_NK,
        tolerance=export.tolerance(run.recipe, expected_NK),
    )
    stablehlo = functools.partial(export.to_stablehlo, run.state, image_shape=shape)
    onnx = functools.partial(export.to_onnx, run.state, image_shape=shape, class_names=names)
    sound = check(out / "model.stablehlo", stablehlo, export.run_stablehlo)
    try:
        sound &= check(out / "model.onnx", onnx, export.run_onnx)
    except (InputError, ImportError) as error:
        print(f"no ONNX: {error}", file=sys.stderr)
    weights = functools.partial(pack_weights, run, dtype="float16" if command.half else "float32")
    rough = export.tolerance(run.recipe, expected_NK, half=command.half)
    sound &= check(out / "weights.safetensors", weights, run_weights, tolerance=rough)
    return int(not sound)


if __name__ == "__main__":
    command_line.run(main)
