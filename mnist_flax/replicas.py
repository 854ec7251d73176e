"""The one module that knows where replicas and batches lie: meshes, placement, `over_replicas`.

A replica is one network of a study: a seed, or a point of a sweep. The arrays of all R replicas are
stacked along a leading axis, which the mesh axis "replica" divides among devices; the devices of a
replica share its batches over the mesh axis "data". A run is the study of one replica.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mnist_flax.data import EVAL_BATCH, Examples, eval_batches
from mnist_flax.errors import InputError
from mnist_flax.steps import TrainState

REPLICA_AXIS = "replica"
BATCH_AXIS = "data"
T = TypeVar("T")


def make_mesh(*, devices: int | None = None, replicas: int = 1) -> Mesh:
    """Returns a mesh of the axes "replica" and "data".

    As many devices as divide both the replicas and the devices work on replicas of their own; what
    is left shares their batches.

    Args:
      devices: how many devices to use, the first ones; None takes all.
      replicas: R.

    Raises:
      InputError: there are fewer devices.
    """
    present = jax.devices()
    if devices is not None and not 1 <= devices <= len(present):
        raise InputError(f"devices is {devices}; this process has {len(present)}")
    return _mesh(np.array(present[:devices]), replicas=replicas)


def mesh_of(state: TrainState) -> Mesh:
    """Returns a mesh of the devices that hold a state, for one replica, as `make_mesh`."""
    sharding = jnp.asarray(state.step).sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    devices = mesh.devices.ravel() if isinstance(mesh, Mesh) else list(sharding.device_set)
    return _mesh(np.array(devices), replicas=1)


def _mesh(devices: np.ndarray, *, replicas: int) -> Mesh:
    groups = math.gcd(replicas, len(devices))
    axes = (REPLICA_AXIS, BATCH_AXIS)
    return Mesh(devices.reshape(groups, -1), axes, axis_types=(AxisType.Auto,) * 2)


def platform_of(mesh: Mesh) -> str:
    """Returns what the mesh's devices are: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def everywhere(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_replica(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [R, ...] whose replicas lie on their own devices."""
    return NamedSharding(mesh, PartitionSpec(REPLICA_AXIS))


def by_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [R, S, B, ...] that a replica's devices share by the batch."""
    return NamedSharding(mesh, PartitionSpec(REPLICA_AXIS, None, BATCH_AXIS))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts arrays that every process holds on the devices.

    `jax.device_put` would send all of them to all processes, to compare.
    """
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(np.shape(a), sharding, np.asarray(a).__getitem__),
        tree,
    )


def sharded_batches(examples: Examples, *, mesh: Mesh, batch_size: int = EVAL_BATCH) -> Examples:
    """Returns a split as `eval_batches` of this size or a little more, shared by the devices."""
    sharing = mesh.shape[BATCH_AXIS]
    batches = eval_batches(examples, batch_size=-(-batch_size // sharing) * sharing)
    return place(batches, NamedSharding(mesh, PartitionSpec(None, BATCH_AXIS)))


def over_replicas(
    fun: Callable[[Any, Any], T], *, mesh: Mesh, loop: bool | None = None
) -> Callable[[Any, Any], T]:
    """Returns `fun(replica, shared)` as a function of all replicas' arrays, [R, ...].

    A device that has one replica runs the program of a single run, to the bit. One that has several
    runs them under `jax.vmap` on a GPU or TPU, and one after another on the CPU, where a vmapped
    convolution is slow: there 8 replicas of `quick` train 19,600 images per second vmapped and
    37,200 one after another (`python experiments/scaling.py`).

    Args:
      fun: a function of one replica's arrays and of what is the same for all.
      mesh: the devices, as `make_mesh` returns them.
      loop: whether a device takes its replicas one after another; None does what is faster there.
    """
    one_by_one = platform_of(mesh) == "cpu" if loop is None else loop

    def count(replicas) -> int:
        return jax.tree.leaves(replicas)[0].shape[0]

    def on_each_device(replicas, shared):
        if count(replicas) == 1:
            one = jax.tree.map(functools.partial(jnp.squeeze, axis=0), replicas)
            return jax.tree.map(lambda a: a[None], fun(one, shared))
        if one_by_one:
            return jax.lax.map(lambda one: fun(one, shared), replicas)
        return jax.vmap(fun, in_axes=(0, None))(replicas, shared)

    divided = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(PartitionSpec(REPLICA_AXIS), PartitionSpec()),
        out_specs=PartitionSpec(REPLICA_AXIS),
        axis_names={REPLICA_AXIS},
        check_vma=False,
    )

    def on_all_devices(replicas, shared):
        run = on_each_device if count(replicas) == 1 else divided
        return run(replicas, shared)

    return on_all_devices


@functools.lru_cache(maxsize=16)
def _expanded(mesh: Mesh) -> Callable[[TrainState], TrainState]:
    def expand(state):
        return jax.tree.map(lambda a: a[None], state)

    return jax.jit(expand, out_shardings=by_replica(mesh))


def stack(state: TrainState, *, mesh: Mesh) -> TrainState:
    """Returns one replica's state as those of all, [1, ...], on the mesh.

    In several processes the state must be on the mesh's devices already.
    """
    if jax.process_count() == 1:
        state = jax.device_put(state, everywhere(mesh))
    return _expanded(mesh)(state)


@jax.jit
def replica(states: TrainState, index: int | jax.Array) -> TrainState:
    """Returns one replica's state of those of all, [R, ...]."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), states)


@jax.jit
def _choose(mask_R: jax.Array | np.ndarray, new: T, old: T) -> T:
    def choose_array(new, old):
        return jnp.where(mask_R.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose_array, new, old)


def choose(mask_R: np.ndarray, new: T, old: T) -> T:
    """Returns the arrays of `new` for the replicas in the mask, those of `old` for the others."""
    if mask_R.all():
        return new
    return _choose(mask_R, new, old) if mask_R.any() else old
