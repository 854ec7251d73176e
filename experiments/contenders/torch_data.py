"""Augmentation in PyTorch, the batch at once: a contender of `benchmark.py`.

python experiments/contenders/torch_data.py mnist.npz 128
"""

import sys
import time

BEGAN = time.perf_counter()

import math

import numpy as np
import torch
from torch.nn import functional
from worker import serve


def main(data: str, batch_size: int) -> None:
    """Serves batches in which every image has an affine map of its own, resampled bilinearly."""
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["images"][:batch_size]).permute(0, 3, 1, 2) / 255

    def work(batches: int) -> None:
        for _ in range(batches):
            angle = torch.empty(batch_size).uniform_(-math.radians(10), math.radians(10))
            shift = torch.empty(batch_size, 2, 1).uniform_(-0.2, 0.2)  # of half the image
            zoom = torch.empty(batch_size, 1, 2).uniform_(0.9, 1.1)
            rows = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
            matrices = torch.stack(rows, -1).reshape(-1, 2, 2) * zoom
            grid = functional.affine_grid(
                torch.cat([matrices, shift], -1), list(images.shape), align_corners=False
            )
            functional.grid_sample(images, grid, align_corners=False)

    work(1)
    serve(work, began=BEGAN)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
