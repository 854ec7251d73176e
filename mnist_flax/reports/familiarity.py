"""How far a picture is from what a network was trained on, to say where an answer means nothing.

The score is the Mahalanobis distance from the nearest class's mean, with one covariance for all
classes, of what the classifier sees (Lee et al. 2018, arXiv 1807.03888) and, because one of few
features sees little else than digits, of the image at a coarse scale. A network itself is as sure
of a shirt or of noise as of a digit.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mnist_flax.data import Examples, Records, Splits, take
from mnist_flax.steps import TrainState, call_model, prepared, to_float, to_model, without_optimizer
from mnist_flax.workdir import write_bytes

FILE = "familiarity.npz"
SHARE = 0.99  # of the images that it was not fitted to, which are to count as familiar
MAX_EXAMPLES = 10_000
RIDGE = 1e-3  # of the mean variance, added to every variance: features can be dependent
BATCH = 500
SIDE = 7  # of the coarse image


@jax.jit
def _features(state: TrainState, images_BHWC: jax.Array) -> jax.Array:
    model = to_model(state)
    seen = prepared(model, images_BHWC)
    has_own = hasattr(model, "features")
    own_BF = model.features(seen) if has_own else call_model(model, seen, train=False)
    B, _, _, C = images_BHWC.shape
    coarse = jax.image.resize(to_float(images_BHWC), (B, SIDE, SIDE, C), "linear")
    return jnp.concatenate([own_BF, coarse.reshape(B, -1)], axis=1)


def features(state: TrainState, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns what images are judged by, float64 [N, F]: of the classifier, and coarse pixels.

    Of a model without `features`, it is the logits.

    Args:
      state: the network.
      images_NHWC: uint8, or float in [0, 1].
    """
    state, chunks = without_optimizer(state), range(0, len(images_NHWC), BATCH)
    seen = [np.asarray(_features(state, images_NHWC[i : i + BATCH])) for i in chunks]
    return np.concatenate(seen).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Familiarity:
    """What a network's training images looked like to its classifier.

    Attributes:
      means_KF: each class's mean, float64 [K, F].
      precision_FF: the inverse of the covariance within classes, float64 [F, F].
      limit: the distance within which SHARE of the images lie that it was not fitted to.
    """

    means_KF: np.ndarray
    precision_FF: np.ndarray
    limit: float

    def distances(self, features_NF: np.ndarray) -> np.ndarray:
        """Returns the squared distance from the nearest class over the limit, float64 [N].

        Above 1, an image is nothing like those that the network was trained on.
        """
        off_NKF = features_NF[:, None] - self.means_KF
        squared_NK = ((off_NKF @ self.precision_FF) * off_NKF).sum(-1)
        return squared_NK.min(-1) / self.limit

    def save(self, workdir: Path) -> None:
        """Writes it into a run's directory."""
        file = io.BytesIO()
        np.savez(file, **dataclasses.asdict(self))
        write_bytes(workdir / FILE, file.getvalue())


def load(workdir: Path) -> Familiarity | None:
    """Reads what `save` wrote; None where a run has none."""
    if not (workdir / FILE).is_file():
        return None
    with np.load(workdir / FILE) as arrays:
        return Familiarity(arrays["means_KF"], arrays["precision_FF"], float(arrays["limit"]))


def fit_familiarity(state: TrainState, splits: Splits) -> Familiarity:
    """Fits to training images, of which every other one sets the limit; `test` is not touched.

    Args:
      state: the network.
      splits: what it was trained on; of many images MAX_EXAMPLES are taken, evenly spread.
    """
    train: Examples | Records = splits.train
    count = min(len(train), MAX_EXAMPLES)
    examples = take(train, np.linspace(0, len(train) - 1, count).astype(np.int64))
    features_NF = features(state, np.asarray(examples.images))
    labels_N = np.asarray(examples.labels)
    fitted_NF, fitted_N = features_NF[::2], labels_N[::2]
    classes = np.unique(fitted_N)
    means_KF = np.stack([fitted_NF[fitted_N == label].mean(0) for label in classes])
    off_NF = fitted_NF - means_KF[np.searchsorted(classes, fitted_N)]
    covariance_FF = off_NF.T @ off_NF / len(off_NF)
    scale = float(np.trace(covariance_FF)) / len(covariance_FF) or 1.0
    precision_FF = np.linalg.inv(covariance_FF + RIDGE * scale * np.eye(len(covariance_FF)))
    own = Familiarity(means_KF, precision_FF, 1.0)
    return dataclasses.replace(
        own, limit=float(np.quantile(own.distances(features_NF[1::2]), SHARE))
    )
