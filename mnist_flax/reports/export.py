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
from flax import nnx

from mnist_flax.errors import InputError
from mnist_flax.ops import REFERENCE
from mnist_flax.steps import TrainState, eval_logits, to_model, with_ops

PLATFORMS = ("cpu", "cuda", "tpu")


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
