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
import numpy as np

from mnist_flax.data import Examples, Records, Splits, take
from mnist_flax.evaluation import features, predict
from mnist_flax.steps import TrainState, to_float, to_model
from mnist_flax.workdir import write_bytes

FILE = "familiarity.npz"
SHARE = 0.99  # of the images that it was not fitted to, which are to count as familiar
MAX_EXAMPLES = 10_000
RIDGE = 1e-3  # of the mean variance, added to every variance: features can be dependent
SIDE = 7  # of the coarse image


@jax.jit
def _coarse(images_NHWC: jax.Array) -> jax.Array:
    N, _, _, C = images_NHWC.shape
    coarse = jax.image.resize(to_float(images_NHWC), (N, SIDE, SIDE, C), "linear")
    return coarse.reshape(N, -1)


def measurements(state: TrainState, images_NHWC: np.ndarray) -> np.ndarray:
    """Returns what images are judged by, float64 [N, F]: the features, and coarse pixels.

    Of a model without `features`, it is the logits.

    Args:
      state: the network.
      images_NHWC: uint8, or float in [0, 1].
    """
    own = features if hasattr(to_model(state), "features") else predict
    seen = (own(state, images_NHWC), np.asarray(_coarse(images_NHWC)))
    return np.concatenate(seen, axis=1).astype(np.float64)


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

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns it as arrays of little size, which change a distance by less than a hundredth.

        Of the precision, its Cholesky factor's triangle in 16 bits.
        """
        factor_FF = np.linalg.cholesky(self.precision_FF)
        scale = np.abs(factor_FF).max()
        return {
            "means": self.means_KF.astype(np.float32),
            "factor": (factor_FF / scale)[np.tril_indices(len(factor_FF))].astype(np.float16),
            "scale": np.asarray(scale, np.float64),
            "limit": np.asarray(self.limit, np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Familiarity:
        """Returns what `to_arrays` made into arrays."""
        F = arrays["means"].shape[1]
        factor_FF = np.zeros((F, F))
        factor_FF[np.tril_indices(F)] = arrays["factor"] * arrays["scale"]
        means_KF = arrays["means"].astype(np.float64)
        return cls(means_KF, factor_FF @ factor_FF.T, float(arrays["limit"]))

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
    features_NF = measurements(state, np.asarray(examples.images))
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
