"""The network: convolutions with BatchNorm, optional dense layers, Dropout."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mnist_flax.checks import check_field_types, check_image_shape
from mnist_flax.compat import List
from mnist_flax.errors import InputError
from mnist_flax.moments import normalize
from mnist_flax.ops import NHWC, REFERENCE, Ops

# One object, as Flax 0.11 keeps it in a network's definition: two networks must have equal ones.
HE_NORMAL = nnx.initializers.he_normal()

Padding = Literal["SAME", "VALID"]
Precision = Literal["float32", "bfloat16"]
Head = Literal["flatten", "mean"]

MAX_PATTERNS = 6


@dataclasses.dataclass(frozen=True)
class CNNConfig:
    """An architecture.

    The defaults are those of the recipe `seed`, after an older Keras notebook, but for
    `norm_momentum`: that of the other recipes, which settles within a run of a few hundred steps.

    Attributes:
      normalize: whether images are brought to nearly the same moments first, before augmentation:
        centre, slant and spread (`mnist_flax.moments.normalize`).
      patch: side of the pixel blocks that are stacked as channels before the first convolution
        (space to depth); 1 leaves the image as it is.
      widths: output channels of each convolution.
      padding: zero padding of each convolution, "SAME" or "VALID".
      pool: whether 2x2 max-pooling ends each convolution's block.
      kernel_size: side of every convolution kernel.
      separable: whether each convolution but the first is depthwise separable: one kernel
        a channel, then a matrix over channels, with nothing between them. Such networks have few
        channels, and are computed in the form that suits few.
      patterns: for each convolution of a separable network, how many of `derivative_patterns` its
        kernels are sums of: that many parameters a kernel. Empty leaves every pixel free.
      conv_bias: whether convolutions have a bias; separable ones have none.
      norm_scale: whether BatchNorm has a scale; the next convolution can do without it.
      norm_momentum: weight of the old value in BatchNorm's running statistics, in [0, 1).
      norm_epsilon: added to BatchNorm's variance, above 0.
      head: what follows the convolutions: "flatten" keeps every place, "mean" averages over them.
      hidden: widths of the dense layers between the convolutions and the classifier.
      dropout: probability that Dropout, before the classifier, zeroes an activation, in [0, 1).
      precision: what convolutions and dense layers compute in, "float32" or "bfloat16". Parameters,
        BatchNorm and the logits are float32 in both.

    Raises:
      InputError: on construction, for a value that no network can have.
    """

    normalize: bool = False
    patch: int = 1
    widths: tuple[int, ...] = (32, 64, 128)
    padding: tuple[Padding, ...] = ("VALID", "VALID", "VALID")
    pool: tuple[bool, ...] = (False, True, True)
    kernel_size: int = 3
    separable: bool = False
    patterns: tuple[int, ...] = ()
    conv_bias: bool = True
    norm_scale: bool = True
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-3
    head: Head = "flatten"
    hidden: tuple[int, ...] = (256,)
    dropout: float = 0.5
    precision: Precision = "float32"

    def __post_init__(self):
        check_field_types(self, prefix="model.")
        if not self.widths:
            raise InputError("model widths is empty; give at least one convolution")
        if not len(self.widths) == len(self.padding) == len(self.pool):
            raise InputError(
                f"model widths, padding and pool have {len(self.widths)}, {len(self.padding)} and "
                f"{len(self.pool)} entries; give one of each a convolution"
            )
        sizes = (self.patch, self.kernel_size, *self.widths, *self.hidden)
        if min(sizes) < 1:
            raise InputError(f"a model size is {min(sizes)}; sizes and widths are at least 1")
        if unknown := set(self.padding) - {"SAME", "VALID"}:
            raise InputError(f"model padding {sorted(unknown)} is unknown; give SAME or VALID")
        if self.separable and self.conv_bias:
            raise InputError(
                "model separable and conv_bias are both set, but separable convolutions have no "
                "bias; set conv_bias to False"
            )
        if self.patterns:
            self._check_patterns(self.patterns)
        if self.head not in ("flatten", "mean"):
            raise InputError(f"model head {self.head!r} is unknown; give flatten or mean")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(
                f"model precision {self.precision!r} is unknown; give float32 or bfloat16"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"model dropout is {self.dropout}; give a number in [0, 1)")
        if not 0 <= self.norm_momentum < 1:
            raise InputError(f"model norm_momentum is {self.norm_momentum}; give one in [0, 1)")
        if not 0 < self.norm_epsilon < 1:
            raise InputError(f"model norm_epsilon is {self.norm_epsilon}; give one in (0, 1)")

    def _check_patterns(self, patterns: tuple[int, ...]) -> None:
        if not self.separable:
            raise InputError("model patterns is set, but only separable networks have them")
        if len(patterns) != len(self.widths):
            raise InputError(
                f"model patterns has {len(patterns)} entries for {len(self.widths)} convolutions; "
                "give one of each"
            )
        if not all(1 <= n <= MAX_PATTERNS for n in patterns):
            raise InputError(f"model patterns is {patterns}; give numbers from 1 to {MAX_PATTERNS}")
        if self.kernel_size < 3:
            raise InputError(f"model patterns needs kernels of 3 or more, not {self.kernel_size}")


def feature_shape(config: CNNConfig, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the shape (H, W, C) of what the convolutions make of an image.

    Raises:
      InputError: the image is too small for the architecture, or no multiple of the patch.
    """
    height, width, _ = image_shape
    if height % config.patch or width % config.patch:
        raise InputError(
            f"model patch is {config.patch}, which does not divide images of {height}x{width}"
        )
    height, width = height // config.patch, width // config.patch
    for padding, pool in zip(config.padding, config.pool, strict=True):
        lost = config.kernel_size - 1 if padding == "VALID" else 0
        side = 2 if pool else 1
        height, width = (height - lost) // side, (width - lost) // side
        if min(height, width) < 1:
            raise InputError(
                f"images of {image_shape[0]}x{image_shape[1]} are too small for this model: "
                "use fewer convolutions, less pooling or SAME padding"
            )
    return height, width, config.widths[-1]


def space_to_depth(images_BHWC: jax.Array, *, patch: int) -> jax.Array:
    """Stacks each block of `patch` x `patch` pixels as channels: [B, H/p, W/p, p*p*C]."""
    B, H, W, C = images_BHWC.shape
    blocks = images_BHWC.reshape(B, H // patch, patch, W // patch, patch, C)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // patch, W // patch, patch**2 * C)


def relu_norm_pool(
    norm: Any, inputs_BHWC: jax.Array, *, pool: bool, train: bool, ops: Ops
) -> jax.Array:
    """Applies ReLU, an `nnx.BatchNorm` and, where `pool`, 2x2 max-pooling.

    With `train`, the batch's own statistics normalise, and `norm`'s running ones move towards them.
    """
    window = 2 if pool else 1
    if not train:
        outputs_BHWC = norm(nnx.relu(inputs_BHWC), use_running_average=True)
        return ops.max_pool(outputs_BHWC, window=window)
    # In the inputs' type, so that their gradients come back in their own.
    bias_C = norm.bias[...].astype(inputs_BHWC.dtype)
    scale_C = jnp.ones_like(bias_C) if norm.scale is None else norm.scale[...].astype(bias_C.dtype)
    outputs_BHWC, mean_C, var_C = ops.relu_norm_pool(
        inputs_BHWC,
        scale_C,
        bias_C,
        epsilon=norm.epsilon,
        window=window,
    )
    # Apart from what comes before, so that XLA rounds them alike in every program.
    mean_C, var_C = jax.lax.optimization_barrier((mean_C, var_C))
    for running, own_C in ((norm.mean, mean_C), (norm.var, var_C)):
        moved_C = norm.momentum * running[...] + (1 - norm.momentum) * own_C
        running[...] = moved_C.astype(running[...].dtype)  # float64 images would widen it
    return outputs_BHWC


def dropout(key: jax.Array, x: jax.Array, *, rate: float | jax.Array) -> jax.Array:
    """Zeroes each element with probability `rate`, in [0, 1), and divides the others by `1 - rate`.

    `nnx.Dropout`, bit for bit, but the rate may be traced: members of a study may differ in it.
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0)


@functools.cache
def derivative_patterns(size: int, number: int) -> np.ndarray:
    """Returns orthonormal patterns, whose sums are an image's derivatives at a pixel.

    In order: the smoothed image, its two slopes, its Laplacian, its mixed second derivative and the
    difference of its two pure ones. A derivative of order m along an axis is m differences of a
    binomially smoothed signal: for a size of 3, [1, 2, 1], [1, 0, -1] and [1, -2, 1]. Kernels that
    are such sums are the structured receptive fields of Jacobsen et al. (2016, arXiv 1605.02971),
    there of Gaussians.

    Args:
      size: side of the patterns, at least 3.
      number: how many of the six.

    Returns:
      float32 [number, size, size].
    """
    smooth, slope, bend = (
        functools.reduce(np.convolve, [[1, -1]] * m + [[1, 1]] * (size - 1 - m), [1.0])
        for m in range(3)
    )
    across, along = np.outer(smooth, bend), np.outer(bend, smooth)
    patterns = [np.outer(smooth, smooth), np.outer(smooth, slope), np.outer(slope, smooth)]
    patterns += [across + along, np.outer(slope, slope), across - along]
    columns = np.stack([pattern.ravel() for pattern in patterns[:number]], axis=1)
    return np.linalg.qr(columns)[0].T.reshape(-1, size, size).astype(np.float32)


def pattern_sums(weights_NX: jax.Array, *, size: int) -> jax.Array:
    """Returns kernels [size, size, ...]: sums of N derivatives' patterns by weights [N, ...]."""
    patterns_NIJ = derivative_patterns(size, len(weights_NX))
    return jnp.tensordot(patterns_NIJ.astype(weights_NX.dtype), weights_NX, axes=(0, 0))


def as_computed(x: jax.Array, *params: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    """Returns a layer's inputs and parameters in `dtype`, or in the inputs' own if it is None."""
    return tuple(a.astype(x.dtype if dtype is None else dtype) for a in (x, *params))


class PatternConv(nnx.Module):
    """A convolution whose kernels are sums of derivatives' patterns."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        kernel_size: int,
        patterns: int,
        padding: Padding,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the patterns' weights with the variance 2 / fan-in of He et al. (2015).

        `dtype` is what the convolution computes in, by default the inputs' own.
        """
        init = HE_NORMAL
        self.weights = nnx.Param(init(rngs.params(), (patterns, n_in, n_out), jnp.float32))
        self.kernel_size = kernel_size
        self.padding = padding
        self.dtype = dtype
        self.ops = REFERENCE

    @property
    def kernel(self) -> jax.Array:
        """The kernels [I, J, C, O]."""
        return pattern_sums(self.weights[...], size=self.kernel_size)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns the convolution [B, H', W', O]."""
        x_BHWC, kernel_IJCO = as_computed(x_BHWC, self.kernel, dtype=self.dtype)
        return self.ops.conv(x_BHWC, kernel_IJCO, (1, 1), self.padding, dimension_numbers=NHWC)


class SeparableConv(nnx.Module):
    """A depthwise convolution, one kernel a channel, and a matrix over channels."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        kernel_size: int,
        patterns: int | None = None,
        padding: Padding,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the kernels; their product has the variance 2 / fan-in of He et al. (2015).

        `patterns` is of how many derivatives' patterns the kernels are sums; by default pixels are
        free. `dtype` is what the convolution computes in, by default the inputs' own.
        """
        shape = (kernel_size, kernel_size) if patterns is None else (patterns,)
        init = nnx.initializers.normal(1 / math.sqrt(math.prod(shape)))
        self.depth = nnx.Param(init(rngs.params(), (*shape, n_in), jnp.float32))
        init = HE_NORMAL
        self.point = nnx.Param(init(rngs.params(), (n_in, n_out), jnp.float32))
        self.kernel_size = kernel_size
        self.padding = padding
        self.dtype = dtype
        self.ops = REFERENCE

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns the convolution [B, H', W', O]."""
        depth = self.depth[...]
        depth_IJC = pattern_sums(depth, size=self.kernel_size) if depth.ndim == 2 else depth
        x_BHWC, depth_IJC, point_CO = as_computed(
            x_BHWC, depth_IJC, self.point[...], dtype=self.dtype
        )
        return self.ops.separable_conv(x_BHWC, depth_IJC, point_CO, padding=self.padding)


def compute_dtype(config: CNNConfig) -> Any:
    """Returns what layers are told to compute in; None lets them keep their inputs' type."""
    return jnp.bfloat16 if config.precision == "bfloat16" else None


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns bfloat16 as float32, and wider types as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def make_conv(config: CNNConfig, index: int, n_in: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the convolution number `index`, of `n_in` channels."""
    n_out, size = config.widths[index], config.kernel_size
    options = {"padding": config.padding[index], "dtype": compute_dtype(config), "rngs": rngs}
    patterns = config.patterns[index] if config.patterns else None
    if config.separable and index > 0:
        return SeparableConv(n_in, n_out, kernel_size=size, patterns=patterns, **options)
    if patterns is not None:
        return PatternConv(n_in, n_out, kernel_size=size, patterns=patterns, **options)
    return nnx.Conv(
        n_in,
        n_out,
        kernel_size=(size, size),
        use_bias=config.conv_bias,
        kernel_init=HE_NORMAL,
        **options,
    )


class CNN(nnx.Module):
    """Convolution -> ReLU -> BatchNorm -> max-pool, a few times; dense; Dropout; classifier.

    Holds no random state: Dropout is handed a key a call.

    Its operations are those of `ops`. The reference ones run anywhere and can be differentiated in
    every way, forward mode (`jvp`, `jacfwd`, `hessian`) included. `ops.for_platform("cpu")` and
    `ops.for_platform("gpu")` (of `mnist_flax.ops`) are faster there, on a CPU inside a loop by far,
    and what `fit` trains with; they can be differentiated in reverse mode alone.
    """

    def __init__(
        self,
        config: CNNConfig,
        *,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        ops: Ops = REFERENCE,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters from `rngs` for images of `image_shape` (H, W, C).

        `ops` changes no parameter, only how the network is computed.

        Raises:
          InputError: the image is too small for the architecture, or no multiple of the patch.
        """
        height, width, channels = feature_shape(config, image_shape)
        inputs = (config.patch**2 * image_shape[-1], *config.widths[:-1])
        self.config = config
        self.image_shape = tuple(image_shape)
        self.convs = List(
            [make_conv(config, index, n_in, rngs=rngs) for index, n_in in enumerate(inputs)]
        )
        self.norms = List(
            [
                nnx.BatchNorm(
                    n,
                    momentum=config.norm_momentum,
                    epsilon=config.norm_epsilon,
                    use_scale=config.norm_scale,
                    rngs=rngs,
                )
                for n in config.widths
            ]
        )
        places = 1 if config.head == "mean" else height * width
        sizes = (places * channels, *config.hidden)
        self.hidden = List(
            [
                nnx.Linear(
                    n_in,
                    n_out,
                    kernel_init=HE_NORMAL,
                    dtype=compute_dtype(config),
                    rngs=rngs,
                )
                for n_in, n_out in itertools.pairwise(sizes)
            ]
        )
        dtype = compute_dtype(config)
        self.head = nnx.Linear(sizes[-1], num_classes, dtype=dtype, rngs=rngs)
        self.use(ops)

    def use(self, ops: Ops) -> None:
        """Computes with `ops` from now on."""
        self.ops = (ops.few_channels or ops) if self.config.separable else ops
        conv: Any
        for conv in self.convs:
            if isinstance(conv, nnx.Conv):
                conv.conv_general_dilated = self.ops.conv
            elif isinstance(conv, PatternConv | SeparableConv):
                conv.ops = self.ops

    def preprocess_images(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns float images in [0, 1] as the network takes them, augmented or not.

        `train_step` and `eval_step` call it. Augmentation comes after it: normalization would take
        back most of a shift, a shear and a zoom.

        Raises:
          InputError: they are not of the (H, W, C) that the network was made for.
        """
        check_image_shape(images_BHWC.shape, self.image_shape)
        return (
            self.ops.materialize(normalize, images_BHWC) if self.config.normalize else images_BHWC
        )

    def features(self, images_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the activations [B, F] that the classifier sees, before Dropout.

        Args:
          images_BHWC: images as `preprocess_images` returns them.
          train: normalise by the batch's own statistics and move the running ones towards them.
        """
        x = space_to_depth(images_BHWC, patch=self.config.patch)
        for conv, norm, pool in zip(self.convs, self.norms, self.config.pool, strict=True):
            x = at_least_float32(conv(x))
            x = relu_norm_pool(norm, x, pool=pool, train=train, ops=self.ops)
        x = x.mean((1, 2)) if self.config.head == "mean" else x.reshape(x.shape[0], -1)
        for dense in self.hidden:
            x = nnx.relu(at_least_float32(dense(x)))
        return x

    def __call__(
        self,
        images_BHWC: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        dropout_rate: float | jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits [B, K].

        Args:
          images_BHWC: images as `preprocess_images` returns them.
          train: whether BatchNorm uses (and records) batch statistics and Dropout is on.
          key: Dropout's key; needed where `train` is set and the dropout rate is not 0.0.
          dropout_rate: in [0, 1), instead of the architecture's; may be traced.

        Raises:
          InputError: Dropout is on, and there is no key.
        """
        features_BF = self.features(images_BHWC, train=train)
        rate = self.config.dropout if dropout_rate is None else dropout_rate
        if train and (isinstance(rate, jax.Array) or rate > 0):
            if key is None:
                raise InputError(f"Dropout of {rate} needs a key in training; give one")
            features_BF = dropout(key, features_BF, rate=rate)
        return at_least_float32(self.head(features_BF))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns `x`, with its derivative multiplied by `factor`."""
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(factor, primals, tangents):
    return primals[0], factor * tangents[0]


class Columns(nnx.Module):
    """Networks side by side, of which each learns by itself; their probabilities are averaged.

    Ciresan, Meier and Schmidhuber (2012, arXiv 1202.2745) call it a multi-column network. In
    training a batch is dealt out, column j of J taking the examples j, J + j, 2 J + j, ...: so each
    column has a loss of its own. With one loss for all they would come to lean on each other, and
    be hardly better than one of them.

    A mean over all B examples is a J-th of the sum of the columns' own means, so in training the
    gradients of the logits are multiplied by J: each column learns as it would alone on its share.
    """

    def __init__(self, columns: Sequence[CNN]):
        """Puts networks of images of one shape side by side."""
        self.columns = List(columns)

    def use(self, ops: Ops) -> None:
        """Computes with `ops` from now on, as `CNN.use`."""
        for column in self.columns:
            column.use(ops)

    def preprocess_images(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns float images in [0, 1] as each column takes them, side by side in channels."""
        return jnp.concatenate(
            [column.preprocess_images(images_BHWC) for column in self.columns], axis=-1
        )

    def features(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns the activations [B, F] that the columns' classifiers see, side by side."""
        return jnp.concatenate(
            [column.features(x) for column, x in self._seen(images_BHWC)], axis=-1
        )

    def _seen(self, images_BHWC):
        """Returns each column with what it sees of images as `preprocess_images` returns them."""
        shown = jnp.split(images_BHWC, len(self.columns), axis=-1)
        return list(zip(self.columns, shown, strict=True))

    def __call__(
        self,
        images_BHWC: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        dropout_rate: float | jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits [B, K]: the log of the columns' mean probability.

        In training each row is of the column that was dealt the example, so the training loss and
        accuracy are the columns' own.

        Args:
          images_BHWC: images as `preprocess_images` returns them; in training B is a multiple of J.
          train: as in `CNN`.
          key: as in `CNN`.
          dropout_rate: as in `CNN`; the same for all columns.

        Raises:
          InputError: the columns cannot share a training batch evenly, or Dropout has no key.
        """
        B, J = images_BHWC.shape[0], len(self.columns)
        seen = self._seen(images_BHWC)
        if not train:
            logs = [jax.nn.log_softmax(column(x)) for column, x in seen]
            return jax.nn.logsumexp(jnp.stack(logs), axis=0) - math.log(J)
        if B % J:
            raise InputError(f"a training batch of {B} cannot be dealt to {J} columns evenly")
        keys = [None] * J if key is None else jax.random.split(key, J)
        # What `preprocess_images` and the augmentation made of the others' examples is dropped.
        # Neighbours, not halves: of a batch that devices share, each deals out its own part.
        logits = [
            column(
                x.reshape(-1, J, *x.shape[1:])[:, j],
                train=True,
                key=keys[j],
                dropout_rate=dropout_rate,
            )
            for j, (column, x) in enumerate(seen)
        ]
        return scale_gradient(jnp.stack(logits, axis=1).reshape(B, -1), J)
