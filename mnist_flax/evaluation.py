"""Exact evaluation of a split: every example once, its logits kept."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mnist_flax.checks import (
    check_image_array,
    check_image_values,
    check_label_array,
    check_label_values,
)
from mnist_flax.data import EVAL_BATCH, Examples, check_examples, eval_batches
from mnist_flax.errors import InputError
from mnist_flax.replicas import (
    by_replica,
    everywhere,
    make_mesh,
    mesh_of,
    over_replicas,
    sharded_batches,
    stack,
)
from mnist_flax.steps import (
    TrainState,
    eval_logits,
    prepared,
    to_model,
)
from mnist_flax.views import View


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A network's logits on N examples, and what follows from them.

    Attributes:
      logits_NK: float32 [N, K]; of `average_probabilities`, float64.
      labels_N: integers [N], in [0, K).

    Raises:
      InputError: on construction, for labels that are not.
    """

    logits_NK: np.ndarray
    labels_N: np.ndarray

    def __post_init__(self):
        check_label_array(self.labels_N, num_examples=len(self.logits_NK))
        check_label_values(self.labels_N, num_classes=self.logits_NK.shape[-1])

    @property
    def log_probabilities_NK(self) -> np.ndarray:
        """Log of the softmax, float64 [N, K], in nats."""
        logits_NK = self.logits_NK.astype(np.float64)
        shifted_NK = logits_NK - logits_NK.max(axis=-1, keepdims=True)
        return shifted_NK - np.log(np.exp(shifted_NK).sum(axis=-1, keepdims=True))

    @property
    def probabilities_NK(self) -> np.ndarray:
        """Softmax, float64 [N, K]."""
        return np.exp(self.log_probabilities_NK)

    @property
    def predictions_N(self) -> np.ndarray:
        """The class of the largest logit, the first of equals, int [N]."""
        return self.logits_NK.argmax(axis=-1)

    @property
    def loss(self) -> float:
        """Mean cross-entropy (negative log-likelihood) in nats."""
        rows_N = np.arange(self.total)
        return float(-self.log_probabilities_NK[rows_N, self.labels_N].mean())

    @property
    def correct(self) -> int:
        """How many predictions are the label."""
        return int((self.predictions_N == self.labels_N).sum())

    @property
    def total(self) -> int:
        """N."""
        return len(self.labels_N)

    @property
    def accuracy(self) -> float:
        """`correct / total`, in [0, 1]."""
        return self.correct / self.total

    @property
    def confusion_KK(self) -> np.ndarray:
        """Counts, int [K, K]: row the label, column the prediction."""
        K = self.logits_NK.shape[-1]
        confusion_KK = np.zeros((K, K), np.int64)
        np.add.at(confusion_KK, (self.labels_N, self.predictions_N), 1)
        return confusion_KK

    @property
    def brier(self) -> float:
        """Brier score: mean squared distance of the probabilities from the label's, in [0, 2]."""
        targets_NK = np.eye(self.logits_NK.shape[-1])[self.labels_N]
        return float(((self.probabilities_NK - targets_NK) ** 2).sum(axis=-1).mean())

    @property
    def precision_K(self) -> np.ndarray:
        """Of the predictions of each class, the share that is right; NaN for none."""
        predicted_K = self.confusion_KK.sum(axis=0)
        return np.diag(self.confusion_KK) / np.where(predicted_K, predicted_K, np.nan)

    @property
    def recall_K(self) -> np.ndarray:
        """Of the examples of each class, the share that is found; NaN for none."""
        real_K = self.confusion_KK.sum(axis=1)
        return np.diag(self.confusion_KK) / np.where(real_K, real_K, np.nan)

    def subset(self, rows: np.ndarray) -> Evaluation:
        """Returns the evaluation of some examples, by index or mask."""
        return Evaluation(self.logits_NK[rows], self.labels_N[rows])

    def at_temperature(self, temperature: float) -> Evaluation:
        """Returns the evaluation with the logits divided by `temperature`."""
        return Evaluation(self.logits_NK / temperature, self.labels_N)


def average_probabilities(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Returns the evaluation whose probabilities are the mean of several's on the same examples.

    Such as an ensemble's members, or random views of the images (test-time augmentation). Its
    logits are log-probabilities.
    """
    logs_ENK = [evaluation.log_probabilities_NK for evaluation in evaluations]
    mean_NK = np.logaddexp.reduce(logs_ENK) - math.log(len(evaluations))
    return Evaluation(mean_NK, evaluations[0].labels_N)


_NO_OPTIMIZER = optax.identity()


def without_optimizer(state: TrainState) -> TrainState:
    """Returns the state without its optimizer, which `jax.jit` would compile anew for.

    Optimizers are functions, and no two of them are equal.
    """
    return dataclasses.replace(state, opt_state=optax.EmptyState(), optimizer=_NO_OPTIMIZER)


def batched_logits(
    state: TrainState, images_SBHWC: jax.Array, view: View | None = None
) -> jax.Array:
    """Returns logits [S, B, K] of stacked batches, as `view` sees them."""

    def logits(batch):
        index, images_BHWC = batch
        return eval_logits(state, images_BHWC, view=None if view is None else view.at(index))

    return jax.lax.map(logits, (jnp.arange(len(images_SBHWC)), images_SBHWC))


@functools.partial(jax.jit, static_argnames="mesh")
def _logits(
    states: TrainState, images_SBHWC: jax.Array, view: View | None, *, mesh: Mesh
) -> jax.Array:
    """Returns `batched_logits` of all replicas, [R, S, B, K], all of them on each device."""

    def of_replica(state, seen):
        return batched_logits(state, *seen)

    logits_RSBK = over_replicas(of_replica, mesh=mesh)(states, (images_SBHWC, view))
    return jax.lax.with_sharding_constraint(logits_RSBK, everywhere(mesh))


def padded_size(num_examples: int) -> int:
    """Returns the examples of a batch that holds so many: a power of two, at most EVAL_BATCH.

    Few sizes, so that few programs are compiled.
    """
    return min(EVAL_BATCH, 1 << (num_examples - 1).bit_length())


def predict(
    state: TrainState, images_NHWC: np.ndarray | jax.Array, *, view: View | None = None
) -> np.ndarray:
    """Returns logits [N, K], float32, of `images_NHWC`, N >= 1, uint8 or float in [0, 1].

    The devices that hold the state share the images.

    Args:
      state: the state; its arrays stay valid.
      images_NHWC: the images.
      view: how to see them; None sees them as they are.

    Raises:
      InputError: there is no image; they are not uint8 or floating-point in [0, 1], or of another
        shape than the model's.
    """
    images_NHWC = _checked(images_NHWC)
    mesh = mesh_of(state)
    states = stack(without_optimizer(state), mesh=mesh)
    size = padded_size(len(images_NHWC))
    return _predict(states, images_NHWC, mesh=mesh, view=view, batch_size=size)[0]


def _checked(images_NHWC: np.ndarray | jax.Array) -> np.ndarray:
    images_NHWC = np.asarray(images_NHWC)
    check_image_array(images_NHWC)
    check_image_values(images_NHWC)
    if not len(images_NHWC):
        raise InputError("there are no images to predict; give at least one")
    return images_NHWC


def _predict(
    states: TrainState,
    images_NHWC: np.ndarray,
    *,
    mesh: Mesh,
    view: View | None,
    batch_size: int = EVAL_BATCH,
) -> np.ndarray:
    """Returns all replicas' logits [R, N, K]; the states lie on the mesh."""
    N = len(images_NHWC)
    padded = Examples(images_NHWC, np.zeros(N, np.int32))
    images_SBHWC = sharded_batches(padded, mesh=mesh, batch_size=batch_size).images
    with jax.set_mesh(mesh):
        logits_RSBK = np.asarray(_logits(states, images_SBHWC, view, mesh=mesh))
    R, K = logits_RSBK.shape[0], logits_RSBK.shape[-1]
    return logits_RSBK.reshape(R, -1, K)[:, :N]


@jax.jit
def _features(state: TrainState, images_BHWC: jax.Array) -> jax.Array:
    model = to_model(state)
    return model.features(prepared(model, images_BHWC))


def features(state: TrainState, images_NHWC: np.ndarray | jax.Array) -> np.ndarray:
    """Returns what the last layer sees of `images_NHWC`, float32 [N, F].

    Such as to look for neighbours, or to train another classifier on.

    Raises:
      InputError: as in `predict`; or the model has no method `features(images_BHWC)`.
    """
    images_NHWC = _checked(images_NHWC)
    if not hasattr(to_model(state), "features"):
        raise InputError("the model has no method features(images_BHWC); give it one")
    state, N = without_optimizer(state), len(images_NHWC)
    padded = Examples(images_NHWC, np.zeros(N, np.int32))
    batches_SBHWC = eval_batches(padded, batch_size=padded_size(N)).images
    return np.concatenate([_features(state, images_BHWC) for images_BHWC in batches_SBHWC])[:N]


def evaluate(state: TrainState, examples: Examples, *, view: View | None = None) -> Evaluation:
    """Evaluates every example once.

    Args:
      state: the state; its arrays stay valid.
      examples: at least one example.
      view: how to see the images; None sees them as they are.

    Raises:
      InputError: as in `predict`; or the labels are not one integer in [0, K) an image.
    """
    check_examples(examples, name="the examples to evaluate")
    return Evaluation(predict(state, examples.images, view=view), np.asarray(examples.labels))


def evaluate_replicas(
    states: TrainState,
    examples: Examples,
    *,
    mesh: Mesh | None = None,
    view: View | None = None,
) -> list[Evaluation]:
    """Evaluates every replica of a study on every example once.

    Args:
      states: stacked states, [R, ...], as `FitResult` holds them.
      examples: at least one example.
      mesh: the devices, whichever hold the states; None takes `make_mesh` of all.
      view: how all replicas see the images; None sees them as they are.

    Raises:
      InputError: as in `evaluate`.
    """
    check_examples(examples, name="the examples to evaluate")
    mesh = mesh or make_mesh(replicas=len(states.step))
    states = jax.device_put(without_optimizer(states), by_replica(mesh))
    logits_RNK = _predict(states, np.asarray(examples.images), mesh=mesh, view=view)
    labels_N = np.asarray(examples.labels)
    return [Evaluation(logits_NK, labels_N) for logits_NK in logits_RNK]
