"""The network: convolutions with BatchNorm, optional dense layers, Dropout."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mnist_flax.checks import check_field_types, check_image_shape
from mnist_flax.compat import List
from mnist_flax.data import DatasetInfo
from mnist_flax.errors import InputError
from mnist_flax.moments import normalize
from mnist_flax.ops import REFERENCE, Ops

# One object, as Flax 0.11 keeps it in a network's definition: two networks must have equal ones.
HE_NORMAL = nnx.initializers.he_normal()

Padding = Literal["SAME", "VALID"]
Precision = Literal["float32", "bfloat16"]
Head = Literal["flatten", "mean"]


@dataclasses.dataclass(frozen=True)
class CNNConfig:
    """An architecture.

    The defaults are those of the recipe `baseline`, after an older Keras notebook, but for
    `norm_momentum`: that of the other recipes, which settles within a run of a few hundred steps.

    Attributes:
      normalize: whether images are brought to nearly the same moments first, before augmentation:
        centre, slant and spread (`mnist_flax.moments.normalize`).
      patch: side of the pixel blocks that are stacked as channels before the first convolution
        (space to depth); 1 leaves the image as it is.
      widths: output channels of each convolution; their kernels are 3 x 3.
      padding: zero padding of each convolution, "SAME" or "VALID".
      pool: whether 2x2 max-pooling ends each convolution's block.
      conv_bias: whether convolutions have a bias.
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
        sizes = (self.patch, *self.widths, *self.hidden)
        if min(sizes) < 1:
            raise InputError(f"a model size is {min(sizes)}; sizes and widths are at least 1")
        if unknown := set(self.padding) - {"SAME", "VALID"}:
            raise InputError(f"model padding {sorted(unknown)} is unknown; give SAME or VALID")
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

    def make(self, info: DatasetInfo, *, rngs: nnx.Rngs) -> CNN:
        """Returns the network for images and classes such as a dataset's.

        Raises:
          InputError: the images are too small for the architecture, or no multiple of the patch.
        """
        size = {"image_shape": info.image_shape, "num_classes": info.num_classes}
        return CNN(self, **size, rngs=rngs)

    @property
    def few_channels(self) -> bool:
        """Whether the network is computed in the form that suits few channels."""
        return False

    def make_conv(self, index: int, n_in: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the convolution number `index`, of `n_in` channels."""
        return nnx.Conv(
            n_in,
            self.widths[index],
            kernel_size=(3, 3),
            padding=self.padding[index],
            use_bias=self.conv_bias,
            kernel_init=HE_NORMAL,
            dtype=compute_dtype(self),
            rngs=rngs,
        )


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
        lost = 2 if padding == "VALID" else 0  # of kernels of 3 x 3
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

    With `train`, the batch's own statistics normalise, and `norm`'s running ones move towards them,
    unless `norm` itself says to use those, as a frozen one does.
    """
    window = 2 if pool else 1
    if not train or norm.use_running_average:
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

    `nnx.Dropout`, bit for bit, but the rate may be traced: replicas may differ in it.
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0)


def compute_dtype(config: CNNConfig) -> Any:
    """Returns what layers are told to compute in; None lets them keep their inputs' type."""
    return jnp.bfloat16 if config.precision == "bfloat16" else None


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns bfloat16 as float32, and wider types as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
            [config.make_conv(index, n_in, rngs=rngs) for index, n_in in enumerate(inputs)]
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
        self.ops = (ops.few_channels or ops) if self.config.few_channels else ops
        conv: Any
        for conv in self.convs:
            if isinstance(conv, nnx.Conv):
                conv.conv_general_dilated = self.ops.conv
            else:
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
