"""The model's operations in forms that are fast on CPUs and GPUs, each a file of its own.

They have the reference's values, and gradients written by hand: reverse mode of any order
(`jax.grad` of `jax.grad`), but no forward mode (`jvp`, `jacfwd`, `hessian`). `CPU` has all five
operations in forms of its own, `GPU` the two that pool, for XLA scatters the gradient of
max-pooling and has no form of that which sums in the same order each time.

Nothing imports this package but `mnist_flax.ops.for_platform`, which goes without it where it is
not there.
"""

import dataclasses
import functools

from mnist_flax.kernels.convolution import conv, few_channels_conv, separable_conv
from mnist_flax.kernels.devices import materialize
from mnist_flax.kernels.pooling import max_pool, relu_norm_pool
from mnist_flax.ops import REFERENCE, Ops

CPU = Ops(
    conv=conv,
    separable_conv=separable_conv,
    max_pool=max_pool,
    relu_norm_pool=relu_norm_pool,
    materialize=materialize,
    few_channels=Ops(
        conv=few_channels_conv,
        separable_conv=separable_conv,
        max_pool=functools.partial(max_pool, few_channels=True),
        relu_norm_pool=functools.partial(relu_norm_pool, few_channels=True),
        materialize=materialize,
    ),
)
GPU = dataclasses.replace(REFERENCE, max_pool=max_pool, relu_norm_pool=relu_norm_pool)
