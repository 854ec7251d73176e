"""Time `mnist_flax.ops` beside plain `lax` and its autodiff, alone, on the CPU.

    python experiments/operations.py

Each line is an operation, the batch shared by one JAX device a core: best of the rounds, in
milliseconds. To expect: the kernel's gradient several times as fast as `lax`'s. Inside a loop, as
in training, `lax`'s is a hundred times slower still (jax-ml/jax#12868). Takes half a minute.
"""

import contextlib
import dataclasses
import functools
import time

from mnist_flax import command_line, runtime
from mnist_flax.errors import InputError

# Height and width, input and output channels, padding, images.
CONVOLUTIONS = (
    (26, 32, 64, "VALID", 128),
    (12, 64, 128, "VALID", 128),
    (14, 4, 16, "SAME", 256),
    (7, 32, 64, "SAME", 256),
)
# The same, of depthwise separable convolutions.
SEPARABLE = ((14, 6, 8, "VALID", 64), (14, 10, 14, "VALID", 64), (14, 16, 32, "VALID", 128))


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      rounds: timings of each operation, of which the best is shown.
    """

    rounds: int = 20

    def __post_init__(self):
        if self.rounds < 1:
            raise InputError(f"rounds is {self.rounds}; give at least 1")


def best_milliseconds(function, operands, *, mesh, rounds: int) -> float:
    """Returns the best time of `function(*operands)` on the mesh's devices."""
    import jax

    seconds = []
    with jax.set_mesh(mesh):
        run = jax.jit(function).lower(*operands).compile()
        for _ in range(rounds):
            began = time.perf_counter()
            jax.block_until_ready(run(*operands))
            seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds)


def main(arguments):
    """Prints a table."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    runtime.configure(cpu_devices=runtime.share_cores(128))

    import jax
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    from mnist_flax import ops
    from mnist_flax.fit import data_mesh

    mesh = data_mesh()
    batch, everywhere = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec())
    )

    def convolution(x, w, *, padding, fast):
        conv = ops.conv if fast else lax.conv_general_dilated
        return conv(x, w, (1, 1), padding, dimension_numbers=ops.NHWC)

    def gradient(x, w, dy, *, argument, padding, fast):
        function = functools.partial(convolution, padding=padding, fast=fast)
        return jax.vjp(function, x, w)[1](dy)[argument]

    print(f"{'':58s}{'ops':>8s}{'lax':>8s}   ms on {mesh.size} devices")
    for size, inputs, outputs, padding, images in CONVOLUTIONS:
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (images, size, size, inputs)
        x = jax.device_put(jax.random.normal(keys[0], shape), batch)
        w = jax.device_put(jax.random.normal(keys[1], (3, 3, inputs, outputs)), everywhere)
        like = jax.eval_shape(functools.partial(convolution, padding=padding, fast=False), x, w)
        dy = jax.device_put(jax.random.normal(keys[2], like.shape), batch)
        cases = {
            "forward": (convolution, (x, w)),
            "gradient of the input": (functools.partial(gradient, argument=0), (x, w, dy)),
            "gradient of the kernel": (functools.partial(gradient, argument=1), (x, w, dy)),
        }
        for name, (function, operands) in cases.items():
            times = [
                best_milliseconds(
                    functools.partial(function, padding=padding, fast=fast),
                    operands,
                    mesh=mesh,
                    rounds=command.rounds,
                )
                for fast in (True, False)
            ]
            label = f"{images} x {size}x{size}x{inputs} -> {outputs} {padding}: {name}"
            print(f"{label:58s}{times[0]:8.2f}{times[1]:8.2f}", flush=True)

    def separable(x, depth, point, *, padding, fast):
        with contextlib.nullcontext() if fast else ops.plain():
            return ops.separable_conv(x, depth, point, padding=padding)

    def gradients(x, depth, point, *, padding, fast):
        function = functools.partial(separable, padding=padding, fast=fast)
        y, vjp = jax.vjp(function, x, depth, point)
        return vjp(y)

    for size, inputs, outputs, padding, images in SEPARABLE:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.device_put(jax.random.normal(keys[0], (images, size, size, inputs)), batch)
        depth, point = (
            jax.device_put(jax.random.normal(key, shape), everywhere)
            for key, shape in ((keys[1], (3, 3, inputs)), (keys[2], (inputs, outputs)))
        )
        for name, function in (("forward", separable), ("forward and gradients", gradients)):
            times = [
                best_milliseconds(
                    functools.partial(function, padding=padding, fast=fast),
                    (x, depth, point),
                    mesh=mesh,
                    rounds=command.rounds,
                )
                for fast in (True, False)
            ]
            label = f"{images} x {size}x{size}x{inputs} -> {outputs} {padding}, separable: {name}"
            print(f"{label:58s}{times[0]:8.2f}{times[1]:8.2f}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
