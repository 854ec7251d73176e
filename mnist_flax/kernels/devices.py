"""A sharded batch is worked on where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mnist_flax.kernels import chunks
from mnist_flax.kernels.chunks import chunk_rows, chunked, joined


def on_each_device(
    fun: Callable,
    batched: tuple,
    shared: tuple = (),
    *,
    total: bool | tuple[bool, ...] = False,
):
    """Returns `fun(*batched, *shared)`, computed on each device for its own examples.

    The compiler would gather a loop over chunks of a sharded batch onto every device. What `fun`
    returns is batched too, or a sum over examples: `total` says so, of all or of each.

    Where the batch lies, of Explicit axes the array's type says. Of Auto axes nothing does, but a
    mesh in context (`jax.set_mesh`) is the one that the program runs on: the batch is divided over
    as many of its axes as can share it. Without a mesh in context it is divided into a group for
    each CPU device, which the compiler divides over those that turn out to hold the batch; on
    a single one of several devices, the groups are worked on together. Only where the batch is no
    multiple of the devices, or they do not divide the CPU's devices, is it computed whole on each.
    """
    mesh, axes = _batch_axes(batched[0])
    if axes:
        return _in_shards(fun, batched, shared, total=total, mesh=mesh, axes=axes)
    groups = math.gcd(len(batched[0]), jax.device_count("cpu")) if mesh.empty else 1
    if groups == 1:
        return fun(*batched, *shared)
    divided = [a.reshape(groups, -1, *a.shape[1:]) for a in batched]
    in_axes = (0,) * len(batched) + (None,) * len(shared)
    out = jax.vmap(fun, in_axes=in_axes)(*divided, *shared)

    def together(sum_, ys):
        return jax.tree.map(lambda y: y.sum(0) if sum_ else joined(y, len(batched[0])), ys)

    return jax.tree.map(together, total, out)


def _batch_axes(x):
    """Returns the mesh, and those of its axes that the first axis of `x` is to be divided over."""
    sharding = jax.typeof(x).sharding
    mesh = jax.sharding.get_abstract_mesh()
    mesh = sharding.mesh if mesh.empty else mesh
    explicit = sharding.spec[0] if sharding.spec else None
    axes = list(explicit) if isinstance(explicit, tuple) else [explicit] if explicit else []
    shares = math.prod(mesh.shape[axis] for axis in axes)
    for axis, type_ in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if type_ == AxisType.Auto and len(x) % (shares * mesh.shape[axis]) == 0:
            axes.append(axis)
            shares *= mesh.shape[axis]
    return mesh, tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _in_shards(fun, batched, shared, *, total, mesh, axes):
    batch, all_ = PartitionSpec(axes), PartitionSpec()

    def of_local(*local):
        return jax.tree.map(lambda sum_, y: lax.psum(y, axes) if sum_ else y, total, fun(*local))

    return jax.shard_map(
        of_local,
        mesh=mesh,
        in_specs=(batch,) * len(batched) + (all_,) * len(shared),
        out_specs=jax.tree.map(lambda sum_: all_ if sum_ else batch, total),
        axis_names=set(axes),
        check_vma=False,
    )(*batched, *shared)


def materialize(function: Callable[[jax.Array], jax.Array], images_BHWC: jax.Array) -> jax.Array:
    """Returns `function(images_BHWC)`, computed once, as `Ops.materialize` does on the CPU.

    There XLA computes anew, for each read, what no loop or matrix product keeps apart, and heeds no
    `lax.optimization_barrier` (256 images resampled twice: 12 ms; in this loop over chunks of the
    batch 1.8).

    Args:
      function: of images [b, H, W, C], each by itself, to as many.
      images_BHWC: the images.
    """

    def of_chunks(x_BHWC):
        row_bytes = math.prod(x_BHWC.shape[1:]) * x_BHWC.dtype.itemsize
        rows = chunk_rows(len(x_BHWC), row_bytes=row_bytes, chunk_bytes=chunks.CHUNK_BYTES // 8)
        return joined(lax.map(function, chunked(x_BHWC, rows)), len(x_BHWC))

    return on_each_device(of_chunks, (images_BHWC,))
