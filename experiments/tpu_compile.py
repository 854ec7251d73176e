"""Compile training for a TPU on a machine that has none.

    pip install -e '.[tpu]' && python experiments/tpu_compile.py --recipes quick tiny2k

The program that `fit` runs is compiled by the TPU's own compiler for chips that are described, not
present, with the batch shared among them. One line for each recipe and number of chips: seconds of
compilation, MB of memory on each chip (arguments, MNIST's images among them, and temporaries), and
FLOPs of a step on each chip. Expected: every recipe compiles, in 6 to 156 s
on a quiet machine.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from typing import Any

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line
from mnist_flax.recipes import RECIPES

CHIPS = 4
COLUMNS = ("recipe", "chips", "compile s", "arguments MB", "temporaries MB", "MFLOP a step")


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      recipes: names of the recipes.
      topology: the chips, as libtpu names them, such as v5e:2x2 or v4:2x2x1.
      chips: on how many of them to compile; each number in turn.
    """

    recipes: tuple[str, ...] = tuple(RECIPES)
    topology: str = "v5e:2x2"
    chips: tuple[int, ...] = (1, CHIPS)


def described_chips(topology: str) -> list:
    """Returns the devices of a topology that need not be present.

    Raises:
      InputError: libtpu is not installed, or knows no such topology.
    """
    # libtpu would ask a metadata server, and wait for it, what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    # What is raised depends on whether libtpu, its plugin or the topology is missing.
    except Exception as error:
        raise InputError(
            f"topology {topology} cannot be had ({str(error).partition(chr(10))[0]}): it needs "
            "pip install 'mnist_flax[tpu]'"
        ) from error


def compile_for(recipe, info, devices):
    """Compiles a recipe's training for a mesh of `devices`; 55,000 examples lie on each."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mnist_flax.data import Examples
    from mnist_flax.metrics import Metrics
    from mnist_flax.ops import for_platform
    from mnist_flax.programs import train_steps
    from mnist_flax.recipe import recipe_state, step_options
    from mnist_flax.replicas import BATCH_AXIS

    num_examples = 60_000 - recipe.val_size
    steps = recipe.steps_per_epoch(num_examples)
    mesh = Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))

    def described(shape, dtype, *axes) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    ops = for_platform("tpu")
    with jax.set_mesh(mesh):
        make = functools.partial(recipe_state, recipe, info, steps_per_epoch=steps, ops=ops)
        state, metrics = jax.tree.map(
            lambda a: described(a.shape, a.dtype), jax.eval_shape(lambda: (make(), Metrics.zero()))
        )
        examples = Examples(
            described((num_examples, *info.image_shape), jnp.uint8),
            described((num_examples,), jnp.int32),
        )
        indices_SB = described((steps, recipe.batch_size), jnp.int32, None, BATCH_AXIS)
        bound = described((), jnp.int32)
        key = described((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
        run = functools.partial(train_steps, **step_options(recipe, steps_per_epoch=steps))
        program = jax.jit(run, donate_argnums=1)
        return program.lower(key, state, metrics, examples, indices_SB, bound, bound).compile()


def main(arguments) -> None:
    """Runs the script."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    recipes = {name: command_line.named_recipe(name) for name in command.recipes}
    devices = described_chips(command.topology)
    if not all(1 <= count <= len(devices) for count in command.chips):
        raise InputError(f"chips must be from 1 to the {len(devices)} of {command.topology}")
    import jax

    from mnist_flax.datasets import load_splits

    info = load_splits("mnist").info
    print(f"jax {jax.__version__}, {devices[0].device_kind}, {command.topology}")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for name, recipe in recipes.items():
        for count in command.chips:
            began = time.perf_counter()
            compiled: Any = compile_for(recipe, info, devices[:count])
            seconds = time.perf_counter() - began
            memory = compiled.memory_analysis()
            # XLA's analysis counts a loop's body once, and nearly all of the program is that.
            row = (
                f"`{name}`",
                f"{count}",
                f"{seconds:.0f}",
                f"{memory.argument_size_in_bytes / 1e6:.0f}",
                f"{memory.temp_size_in_bytes / 1e6:.0f}",
                f"{compiled.cost_analysis()['flops'] / 1e6:,.0f}",
            )
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    command_line.run(main)
