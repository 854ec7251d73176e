"""Exact evaluation of a split: every example once, its logits kept."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from mnist_flax.data import Examples, eval_batches
from mnist_flax.steps import TrainState, eval_logits

EVAL_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A network's logits on N examples, and what follows from them.

    Attributes:
      logits_NK: float32 [N, K].
      labels_N: int32 [N], in [0, K).
    """

    logits_NK: np.ndarray
    labels_N: np.ndarray

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


@jax.jit
def _batched_logits(state: TrainState, images_SBHWC: jax.Array) -> jax.Array:
    return jax.lax.map(lambda images_BHWC: eval_logits(state, images_BHWC), images_SBHWC)


def predict(state: TrainState, images_NHWC: np.ndarray | jax.Array) -> np.ndarray:
    """Returns logits [N, K], float32, of `images_NHWC`, N >= 1, uint8 or float in [0, 1]."""
    N = len(images_NHWC)
    padded = Examples(np.asarray(images_NHWC), np.zeros(N, np.int32))
    batches = eval_batches(padded, batch_size=min(N, EVAL_BATCH))
    logits_SBK = np.asarray(_batched_logits(state, batches.images))
    return logits_SBK.reshape(-1, logits_SBK.shape[-1])[:N]


def evaluate(state: TrainState, examples: Examples) -> Evaluation:
    """Evaluates every example once.

    Args:
      state: the state; its arrays stay valid.
      examples: at least one example.
    """
    return Evaluation(predict(state, examples.images), np.asarray(examples.labels))
