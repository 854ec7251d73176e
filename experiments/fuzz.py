"""Fuzz what reads foreign bytes, guided by coverage: archives, recipes, command lines, pictures.

    pip install -e '.[fuzz]'
    python experiments/fuzz.py archive -max_total_time=60

The other targets are `recipe`, `command` and `picture`; what follows is libFuzzer's. Expected: it
ends after the time without a finding, for each refuses with the package's own error, or reads.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    atheris: Any = importlib.import_module("atheris")  # of the extra, so type checkers may lack it
except ImportError:
    print("error: fuzzing needs atheris: pip install -e '.[fuzz]'", file=sys.stderr)
    sys.exit(2)

with atheris.instrument_imports(include=["mnist_flax"]):
    from mnist_flax.datasets import archives
    from mnist_flax.errors import InputError
    from mnist_flax.launch import command_line
    from mnist_flax.recipe import Recipe, from_dict, to_dict
    from mnist_flax.recipes import RECIPES
    from mnist_flax.reports import digits

# In memory: libFuzzer ends the process without a chance to remove a file.
FILE = Path(f"/proc/self/fd/{os.memfd_create('fuzzed')}")
DEFAULT = to_dict(RECIPES["default"])


def archive(data: bytes) -> None:
    """Reads an IDX archive."""
    FILE.write_bytes(data)
    for ndim in (1, 3):
        try:
            array = archives.read_idx(FILE, ndim=ndim)
        except InputError:
            continue
        assert array.ndim == ndim
        assert array.nbytes <= 2**24


def picture(data: bytes) -> None:
    """Finds the digits on a picture."""
    FILE.write_bytes(data)
    try:
        digits.find_digits(digits.read_picture(FILE))
    except InputError:
        return


def recipe(data: bytes) -> None:
    """Rebuilds a recipe from JSON, and reads it back."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    for candidate in (values, DEFAULT | values if isinstance(values, dict) else values):
        try:
            built = from_dict(candidate)
        except InputError:
            continue
        assert from_dict(to_dict(built)) == built


def command(data: bytes) -> None:
    """Parses a command line."""
    try:
        name, rest = command_line.split_recipe(data.decode(errors="replace").split("\0"))
        default = command_line.named_recipe(name)
        command_line.parse(Recipe, rest, default=default, description="")
    except InputError:
        return
    except SystemExit as stop:
        if stop.code:  # not --help
            raise


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (archive, recipe, command, picture)
}


def main(arguments):
    """Fuzzes the target that the first argument names; the others go to libFuzzer."""
    if not arguments or arguments[0] not in TARGETS:
        raise InputError(f"give a target: {', '.join(TARGETS)}")
    atheris.Setup([sys.argv[0], *arguments[1:]], TARGETS[arguments[0]])
    atheris.Fuzz()


if __name__ == "__main__":
    command_line.run(main)
