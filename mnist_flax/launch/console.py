"""`mnist-flax NAME ...` runs a script of experiments/, which are installed with the package."""

import importlib
import sys

from mnist_flax.launch import command_line

SCRIPTS = ("train", "predict", "report", "export", "demo", "page", "seeds", "sweep", "folds")


def main() -> None:
    """Runs the script that the first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in SCRIPTS:
        print(f"usage: mnist-flax NAME ...; NAME is one of {', '.join(SCRIPTS)}", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    sys.argv = [f"mnist-flax {name}", *sys.argv[2:]]
    command_line.run(importlib.import_module(f"mnist_flax.experiments.{name}").main)
