"""The notebook's network in PyTorch: a contender of `benchmark.py`, run in its own environment.

python experiments/contenders/torch_step.py mnist.npz 128 channels_last eager
"""

import sys
import time

BEGAN = time.perf_counter()

import numpy as np
import torch
from torch import nn
from worker import serve


def make_model() -> nn.Module:
    """Returns the network; 915,146 parameters."""

    def block(inputs, outputs, *, pool):
        layers = [nn.Conv2d(inputs, outputs, 3), nn.ReLU(), nn.BatchNorm2d(outputs, 1e-3, 0.01)]
        return layers + [nn.MaxPool2d(2)] * pool

    model = nn.Sequential(
        *block(1, 32, pool=False),
        *block(32, 64, pool=True),
        *block(64, 128, pool=True),
        nn.Flatten(),
        nn.Linear(3200, 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, 10),
    )
    assert sum(p.numel() for p in model.parameters()) == 915_146
    return model


def main(data: str, batch_size: int, layout: str, mode: str) -> None:
    """Serves training steps on uint8 images that lie in memory."""
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(arrays["labels"]).long()
    memory_format = getattr(torch, layout)
    model = make_model().to(memory_format=memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def loss_of(images_u8, targets):
        inputs = images_u8.float().div(255).contiguous(memory_format=memory_format)
        return nn.functional.cross_entropy(model(inputs), targets)

    compiled = torch.compile(loss_of) if mode == "compile" else loss_of

    def train(steps: int) -> None:
        for step in range(steps):
            rows = slice(step * batch_size, (step + 1) * batch_size)
            optimizer.zero_grad(set_to_none=True)
            loss = compiled(images[rows], labels[rows])
            loss.backward()
            optimizer.step()
        assert bool(torch.isfinite(loss))

    train(2)
    serve(train, began=BEGAN)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
