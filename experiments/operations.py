"""Time `mnist_flax.kernels` beside plain `lax` and its autodiff, alone, on the CPU.

    python experiments/operations.py

Each line is an operation, the batch shared by one JAX device a core: best of the rounds, in
milliseconds, of float32 unless bfloat16 is named. Expected: the kernel's gradient several times
as fast as `lax`'s, and separable convolutions up to 1.7 times, though alone they must bring images
into planes and back. Inside a loop, as in training, `lax`'s gradients are a hundred times slower
still (jax-ml/jax#12868). Takes a minute.
"""

import dataclasses
import functools
import time

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line, runtime

# Height and width, input and output channels, padding, images; each also in bfloat16.
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


def print_times(label: str, function, operands, *, mesh, rounds: int) -> None:
    """Prints the best time of `function(*operands, fast=...)` with `ops` and with `lax`."""
    times = [
        best_milliseconds(
            functools.partial(function, fast=fast), operands, mesh=mesh, rounds=rounds
        )
        for fast in (True, False)
    ]
    print(f"{label:70s}{times[0]:8.2f}{times[1]:8.2f}", flush=True)


def time_convolution(put, *, size, inputs, outputs, padding, images, dtype="float32", **options):
    """Prints the times of a convolution of 3x3 and of its gradients; `put` makes random arrays."""
    import jax

    from mnist_flax import kernels, ops

    def convolution(x, w, *, fast):
        own = kernels.CPU if fast else ops.REFERENCE
        return own.conv(x, w, (1, 1), padding, dimension_numbers=ops.NHWC)

    def gradients(x, w, dy, *, fast):
        return jax.vjp(functools.partial(convolution, fast=fast), x, w)[1](dy)

    put = functools.partial(put, dtype=dtype)
    x, w = put(images, size, size, inputs, shared=True), put(3, 3, inputs, outputs)
    like = jax.eval_shape(functools.partial(convolution, fast=False), x, w)
    dy = put(*like.shape, shared=True)
    label = f"{images} x {size}x{size}x{inputs} -> {outputs} {padding}"
    label += ", bfloat16" if dtype == "bfloat16" else ""
    print_times(f"{label}: forward", convolution, (x, w), **options)
    print_times(f"{label}: gradients", gradients, (x, w, dy), **options)


def time_separable(put, *, size, inputs, outputs, padding, images, **options):
    """Prints the times of a separable convolution of 3x3, and with its gradients."""
    import jax

    from mnist_flax import kernels, ops

    def convolution(x, depth, point, *, fast):
        own = kernels.CPU if fast else ops.REFERENCE
        return own.separable_conv(x, depth, point, padding=padding)

    def gradients(x, depth, point, *, fast):
        y, vjp = jax.vjp(functools.partial(convolution, fast=fast), x, depth, point)
        return vjp(y)

    x = put(images, size, size, inputs, shared=True)
    operands = x, put(3, 3, inputs), put(inputs, outputs)
    label = f"{images} x {size}x{size}x{inputs} -> {outputs} {padding}, separable"
    print_times(f"{label}: forward", convolution, operands, **options)
    print_times(f"{label}: forward and gradients", gradients, operands, **options)


def main(arguments):
    """Prints a table."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    command_line.begin(cpu_devices=runtime.share_cores(128))

    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from mnist_flax.replicas import make_mesh

    mesh = make_mesh()

    def put(*shape, shared=False, dtype="float32"):
        spec = PartitionSpec("data") if shared else PartitionSpec()
        numbers = jax.random.normal(jax.random.key(0), shape, dtype)
        return jax.device_put(numbers, NamedSharding(mesh, spec))

    print(f"{'':70s}{'ops':>8s}{'lax':>8s}   ms on {mesh.size} devices")
    options = {"mesh": mesh, "rounds": command.rounds}
    half = functools.partial(time_convolution, dtype="bfloat16")
    times = (time_convolution, CONVOLUTIONS), (half, CONVOLUTIONS), (time_separable, SEPARABLE)
    for time_one, cases in times:
        for size, inputs, outputs, padding, images in cases:
            shape = {"size": size, "inputs": inputs, "outputs": outputs, "images": images}
            time_one(put, **shape, padding=padding, **options)


if __name__ == "__main__":
    command_line.run(main)
