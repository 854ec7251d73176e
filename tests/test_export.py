"""Exported files, run without the package, against the network itself."""

import dataclasses
import json
import logging
import subprocess
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import MODEL

from mnist_flax.evaluation import predict
from mnist_flax.loop import initial_state
from mnist_flax.models.columns import ColumnsConfig
from mnist_flax.recipes import RECIPES
from mnist_flax.replicas import make_mesh
from mnist_flax.reports import export

ALONE = """
import sys
import jax, numpy as np
data = np.load(sys.argv[2])
model = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for count in (1, 7, 50):
    logits = np.asarray(model.call(data["images"][:count]))
    np.testing.assert_allclose(logits, data["logits"][:count], rtol=0, atol=1e-4)
assert not [name for name in sys.modules if name.startswith(("mnist_flax", "flax"))]
print("agreed")
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("default", marks=pytest.mark.slow),
        pytest.param("baseline", marks=pytest.mark.slow),
        pytest.param("tiny700", marks=pytest.mark.slow),
        "columns",
    ],
)
def state(request, splits):
    """A network with statistics that are not those it began with."""
    model = dataclasses.replace(MODEL, hidden=())
    columns = ColumnsConfig((model, dataclasses.replace(model, normalize=True)))
    small = dataclasses.replace(RECIPES["quick"], model=columns)
    recipe = small if request.param == "columns" else RECIPES[request.param]
    state = initial_state(recipe, splits.info, steps=1, mesh=make_mesh(devices=1))
    rng = np.random.default_rng(0)
    statistics = jax.tree.map(
        lambda a: a + rng.uniform(0, 0.5, a.shape).astype(a.dtype), state.batch_stats
    )
    return state.__class__(**(vars(state) | {"batch_stats": statistics}))


@pytest.fixture
def images(splits):
    return splits.test.images[:50] / np.float32(255)


@pytest.mark.slow
def test_stablehlo_runs_without_the_package(state, images, tmp_path):
    path = tmp_path / "model.stablehlo"
    path.write_bytes(export.to_stablehlo(state, image_shape=(28, 28, 1)))
    np.savez(tmp_path / "data.npz", images=images, logits=predict(state, images))
    words = [sys.executable, "-c", ALONE, str(path), str(tmp_path / "data.npz")]
    run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.stdout == "agreed\n", run.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the converter's
def test_onnx_agrees_at_any_batch_size(state, images):
    names = tuple("0123456789")
    with jax.numpy_rank_promotion("allow"):  # in the converter
        model = export.to_onnx(state, image_shape=(28, 28, 1), class_names=names)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(names)
    expected = predict(state, images)
    for count in (1, 7, 50):
        (logits,) = session.run(None, {"images": images[:count]})
        np.testing.assert_allclose(logits, expected[:count], rtol=0, atol=1e-4)


def test_exported_programs_hold_no_cpu_formulation(state):
    """On every platform the same plain operations: no loop over chunks."""
    exported = jax.export.deserialize(
        bytearray(export.to_stablehlo(state, image_shape=(28, 28, 1)))
    )
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert "stablehlo.while" not in exported.mlir_module()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the converter's
def test_a_network_of_bfloat16_becomes_one_of_float32(splits, images):
    """ONNX Runtime can load it; a layer's numbers of bfloat16 have 8 bits."""
    recipe = RECIPES["tiny700"]
    half = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, precision="bfloat16")
    )
    states = [
        initial_state(r, splits.info, steps=1, mesh=make_mesh(devices=1)) for r in (half, recipe)
    ]
    logging.disable(logging.DEBUG)
    try:
        with jax.numpy_rank_promotion("allow"):  # in the converter
            model = export.to_onnx(states[0], image_shape=(28, 28, 1), class_names=("0",) * 10)
        assert logging.root.manager.disable == logging.DEBUG  # what the caller had asked for
    finally:
        logging.disable(logging.NOTSET)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images})
    np.testing.assert_allclose(logits, predict(states[1], images), rtol=0, atol=1e-4)
    rounded = predict(states[0], images)
    assert 0 < np.abs(rounded - logits).max() < 2**-5 * np.abs(logits).max()
