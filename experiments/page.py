"""Write a page that reads digits in the browser, without a server: one folder of static files.

    python experiments/page.py --out page                # the weights that come with the package
    python -m http.server --bind 127.0.0.1 --directory page

Then http://127.0.0.1:8000 is a sheet to draw on, and what the network makes of it changes as one
draws. Any host of static files serves the folder, below any path; a browser does not load it from
file://. It needs `pip install -e '.[export]'`, and npm, which fetches onnxruntime-web once: of the
folder's 14 MB and the network's, most is that. The page asks no other host for anything.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line
from mnist_flax.workdir import require_directory


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      run: a run's directory or weights, of a network that reads digits or their like, of 28x28 grey
        pixels; by default "default", which comes with the package.
      out: the new folder; by default page/ in the run's directory.
    """

    run: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path | None = None


def main(arguments):
    """Writes the folder."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    if len(command.run) > 1:
        raise InputError("name one run directory; see --help")
    run_path = command.run[0] if command.run else Path("default")
    if command.out is None and not run_path.is_dir():
        raise InputError("name a run's directory, or the folder to write with --out; see --help")
    out = command.out or run_path / "page"
    if out.exists():
        raise InputError(f"out is {out}, which exists already; remove it, or name another")
    require_directory(out, "out")

    from mnist_flax.datasets.folders import VERSION
    from mnist_flax.reports import page
    from mnist_flax.reports.digits import require_shape
    from mnist_flax.reports.runs import load_run

    npm = page.find_npm()
    command_line.begin()
    run = load_run(run_path)
    print(run, file=sys.stderr)
    if run.info.version == VERSION:
        raise InputError(f"{run.workdir} was trained on folders of images; the page reads digits")
    require_shape(run.info.image_shape)
    files = page.page_files(run, npm=npm)
    page.write_folder(out, files)
    megabytes = sum(map(len, files.values())) / 1e6
    print(f"{out}: {len(files)} files, {megabytes:.1f} MB; to look at it:")
    print(f"python -m http.server --bind 127.0.0.1 --directory {out}")


if __name__ == "__main__":
    command_line.run(main)
