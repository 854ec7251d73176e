"""Train and study handwritten-digit classifiers in JAX and Flax."""

from mnist_flax.augment import random_affine
from mnist_flax.data import Examples, Splits, load_splits
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.evaluate import Evaluation, evaluate, predict
from mnist_flax.fit import EpochResult, FitResult, epochs, fit
from mnist_flax.members import MembersResult, evaluate_many, fit_many
from mnist_flax.metrics import Metrics
from mnist_flax.model import CNN, CNNConfig
from mnist_flax.ops import for_platform
from mnist_flax.recipes import RECIPES, Recipe
from mnist_flax.steps import TrainState, create_state, eval_step, train_step
from mnist_flax.stopping import EarlyStopping

__all__ = [
    "CNN",
    "RECIPES",
    "CNNConfig",
    "DivergedError",
    "EarlyStopping",
    "EpochResult",
    "Evaluation",
    "Examples",
    "FitResult",
    "InputError",
    "Interrupted",
    "MembersResult",
    "Metrics",
    "Recipe",
    "Splits",
    "TrainState",
    "create_state",
    "epochs",
    "eval_step",
    "evaluate",
    "evaluate_many",
    "fit",
    "fit_many",
    "for_platform",
    "load_splits",
    "predict",
    "random_affine",
    "train_step",
]
