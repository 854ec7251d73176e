"""Augmentation as PyTorch's users know it, torchvision's: a contender of `benchmark.py`.

python experiments/contenders/torch_data.py mnist.npz 128
"""

import sys
import time

BEGAN = time.perf_counter()

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2
from worker import serve


def main(data: str, batch_size: int) -> None:
    """Serves batches in which every image has a transformation of its own."""
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["images"][:batch_size]).permute(0, 3, 1, 2) / 255
    transform = v2.RandomAffine(
        10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR
    )

    def work(batches: int) -> None:
        for _ in range(batches):
            torch.stack([transform(image) for image in images])

    work(1)
    serve(work, began=BEGAN)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
