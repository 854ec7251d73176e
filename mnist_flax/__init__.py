"""Train and study handwritten-digit classifiers in JAX and Flax."""

from mnist_flax.augment import random_affine
from mnist_flax.data import Examples, Splits
from mnist_flax.datasets import load_splits
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.evaluation import Evaluation, evaluate, evaluate_replicas, features, predict
from mnist_flax.loop import epochs, fit
from mnist_flax.metrics import Metrics
from mnist_flax.model import CNN, CNNConfig
from mnist_flax.ops import for_platform
from mnist_flax.progress import FitResult, Progress
from mnist_flax.recipe import Recipe
from mnist_flax.recipes import RECIPES
from mnist_flax.replicas import make_mesh
from mnist_flax.reports.runs import load_run
from mnist_flax.steps import TrainState, create_state, eval_step, train_step
from mnist_flax.stopping import EarlyStopping

__all__ = [
    "CNN",
    "RECIPES",
    "CNNConfig",
    "DivergedError",
    "EarlyStopping",
    "Evaluation",
    "Examples",
    "FitResult",
    "InputError",
    "Interrupted",
    "Metrics",
    "Progress",
    "Recipe",
    "Splits",
    "TrainState",
    "create_state",
    "epochs",
    "eval_step",
    "evaluate",
    "evaluate_replicas",
    "features",
    "fit",
    "for_platform",
    "load_run",
    "load_splits",
    "make_mesh",
    "predict",
    "random_affine",
    "train_step",
]
