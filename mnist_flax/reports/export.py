"""A trained network as a file that runs without this package: StableHLO and ONNX.

Both take images [B, H, W, C], float32 in [0, 1], of any batch size B, and return logits [B, K].
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mnist_flax.errors import InputError
from mnist_flax.ops import REFERENCE
from mnist_flax.recipe import Recipe
from mnist_flax.steps import TrainState, eval_logits, to_model, with_ops

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-3  # of logits of about 10, in float32
# Of the largest logit: a network of four layers rounds a dozen times, each by 2^-9 at most, and
# another order of the same sums rounds otherwise. Of a network of `quick` 0.005 was seen.
BFLOAT16_TOLERANCE = 2**-5


def inference(state: TrainState) -> Callable[[jax.Array], jax.Array]:
    """Returns `infer(images_BHWC) -> logits_BK`, of plain operations; parameters are constants."""
    return functools.partial(eval_logits, with_ops(state, REFERENCE))


def in_float32(state: TrainState) -> TrainState:
    """Returns the state with layers that computed in bfloat16 computing in float32."""
    model = to_model(state)
    for _, node in nnx.iter_graph(model):
        if getattr(node, "dtype", None) is jnp.bfloat16:
            node.dtype = None  # of its inputs and parameters
    return dataclasses.replace(state, graphdef=nnx.graphdef(model))


@contextlib.contextmanager
def _without_log(level: int) -> Iterator[None]:
    """Switches off all log messages up to a level; what the caller had switched off stays so."""
    before = logging.root.manager.disable
    logging.disable(max(level, before))
    try:
        yield
    finally:
        logging.disable(before)


def to_stablehlo(state: TrainState, *, image_shape: tuple[int, int, int]) -> bytes:
    """Returns the network as a serialized `jax.export.Exported`, for CPU, CUDA and TPU."""
    (batch,) = jax.export.symbolic_shape("B")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    exported = jax.export.export(jax.jit(inference(state)), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def to_onnx(
    state: TrainState, *, image_shape: tuple[int, int, int], class_names: tuple[str, ...]
) -> bytes:
    """Returns the network as an ONNX model, with the class names as JSON in its metadata.

    It computes in float32, a network of bfloat16 too (see `in_float32`): ONNX Runtime has no
    convolution in bfloat16 for CPUs.

    Raises:
      InputError: the converter is not installed.
    """
    try:
        import jax2onnx
    except ImportError:
        raise InputError(
            "ONNX needs the package jax2onnx: pip install 'mnist_flax[export]'"
        ) from None
    with _without_log(logging.WARNING):  # the converter's own, of shapes that it can do without
        model = jax2onnx.to_onnx(
            inference(in_float32(state)),
            [("B", *image_shape)],
            model_name="mnist_flax",
            return_mode="proto",
        )
    model.graph.input[0].name, renamed = "images", model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["images" if name == renamed else name for name in node.input]
    entry = model.metadata_props.add()
    entry.key, entry.value = "class_names", json.dumps(class_names)
    return model.SerializeToString()


def run_stablehlo(data: bytes, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns the logits [N, K] of a serialized program."""
    loaded = jax.export.deserialize(bytearray(data))
    parts = [loaded.call(images_BHWC) for images_BHWC in np.array_split(images_NHWC, 10)]
    return np.concatenate(parts)


def run_onnx(data: bytes, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns the logits [N, K] of an ONNX model.

    Raises:
      ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    batches = np.array_split(images_NHWC, 10)
    return np.concatenate([np.asarray(session.run(None, {"images": i})[0]) for i in batches])


def tolerance(recipe: Recipe, logits_NK: np.ndarray, *, half: bool = False) -> float:
    """Returns by how much a logit of an exported network may differ from the run's own.

    Args:
      recipe: the run's; a network of bfloat16 may differ by more.
      logits_NK: the run's logits.
      half: whether its weights were rounded to 16 bits, which may make as much of a difference.
    """
    networks = getattr(recipe.model, "columns", (recipe.model,))
    precisions = {getattr(network, "precision", "float32") for network in networks}
    if half or "bfloat16" in precisions:
        return BFLOAT16_TOLERANCE * float(np.abs(logits_NK).max())
    return TOLERANCE
