"""The notebook runs from top to bottom, draws its pictures, and is committed clean."""

import base64
import struct
from pathlib import Path

import jax
import nbformat
import pytest
from conftest import ALL
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "mnist_colab.ipynb"
PICTURES = ("digits", "augmentation", "curves", "predictions", "mistakes", "confusion")


@pytest.fixture(scope="module")
def executed(data_dir, tmp_path_factory):
    """The notebook's cells by id, after a run on a few examples in this interpreter."""
    jupyter = tmp_path_factory.mktemp("jupyter")
    write_kernel_spec(jupyter / "kernels" / "python3")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["parameters"].source = "EPOCHS = 1\nNUM_TRAIN = 512\nNUM_TEST = 500"
    if not ALL:
        cells["recipe"].source = """
from mnist_flax.model import CNNConfig

model = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), hidden=(), patch=2)
recipe = dataclasses.replace(DEFAULT, epochs=EPOCHS, val_size=500, model=model)
"""
    # It would install into the environment that runs the tests.
    cells["install"].source = ""
    with pytest.MonkeyPatch.context() as environment:
        # No kernel, start-up file or connection of the user's.
        environment.setenv("JUPYTER_PATH", str(jupyter))
        environment.setenv("JUPYTER_RUNTIME_DIR", str(jupyter / "runtime"))
        environment.setenv("IPYTHONDIR", str(jupyter / "ipython"))
        environment.setenv("TFDS_DATA_DIR", str(data_dir))
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": ROOT}}).execute()
    return cells


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_every_cell_runs_once_in_order(executed):
    code = [cell for cell in executed.values() if cell.cell_type == "code" and cell.source]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.slow
def test_prints_the_device(executed):
    assert f"JAX {jax.__version__}, cpu: " in printed(executed["imports"])


@pytest.mark.slow
def test_trains_and_evaluates_once(executed):
    assert "epoch  1  train loss" in printed(executed["training"])
    assert "best: epoch 1" in printed(executed["training"])
    [line] = printed(executed["test"]).splitlines()
    assert line.startswith("test accuracy ")
    assert "/500), loss " in line


@pytest.mark.parametrize("cell_id", PICTURES)
@pytest.mark.slow
def test_cell_displays_one_picture(executed, cell_id):
    pictures = [output.data["image/png"] for output in executed[cell_id].outputs]
    assert len(pictures) == 1
    header = base64.b64decode(pictures[0])[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:])) > 200


@pytest.mark.slow
def test_the_readers_digit_is_read_by_the_shipped_network(executed):
    assert printed(executed["own"]).splitlines()[1] == "the package's: 7"


def test_committed_without_results():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
