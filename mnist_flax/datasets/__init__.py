"""Where examples come from: IDX archives, and what TFDS has prepared."""

from mnist_flax.datasets.loading import load_splits

__all__ = ["load_splits"]
