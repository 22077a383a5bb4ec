"""Soft targets for Fashion-MNIST by networks that were not trained on the images they label.

Three convolutional networks, each trained on two thirds of the training images; together they label
all of them. A teacher is nearly always right about images that it was trained on, and so has less
to tell about them. Logits are means of those of an image and of its mirror image.

    python benchmarks/teacher.py        # trains, writes .cache/soft_targets.pt, prints accuracies
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import fashion_mnist
from launch.compress import accuracy, logits_of

CACHE = fashion_mnist.CACHE.parent / "soft_targets.pt"
FOLDS = 3
EPOCHS = 20
BATCH = 128
LR = 3e-3


def network() -> nn.Module:
    """Three convolutions with batch norm; 165,000 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 48), (48, 96), (96, 128)):
        conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 9, 10))


def train_fold(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """AdamW, one cycle, half of the images mirrored."""
    torch.manual_seed(seed)
    model = network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05, fused=True)
    steps = EPOCHS * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.2)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            x = images[rows]
            mirrored = torch.rand(len(rows))[:, None, None, None] < 0.5
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(torch.where(mirrored, x.flip(3), x))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


def both_ways(model: nn.Module, images: Tensor) -> Tensor:
    """The mean of the logits of `images` and of their mirror images."""
    return (logits_of(model, images) + logits_of(model, images.flip(3))) / 2


def targets(data: fashion_mnist.Data) -> Tensor:
    """Logits `[n, 10]` on the training images, from the cache or trained."""
    if CACHE.exists():
        return torch.load(CACHE)
    found = torch.empty(len(data.train_labels), 10)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(7))
    for fold in range(FOLDS):
        unseen = order[fold::FOLDS]
        seen = torch.ones(len(found), dtype=torch.bool).index_fill(0, unseen, False)
        images, labels = data.train_images[seen], data.train_labels[seen]
        model = train_fold(images, labels, seed=1000 + fold)
        found[unseen] = both_ways(model, data.train_images[unseen])
        right = accuracy(model, data.test_images, data.test_labels)
        print(f"teacher {fold}: test accuracy {right:.2f} %", flush=True)
    CACHE.parent.mkdir(exist_ok=True)
    torch.save(found, CACHE)
    return found


if __name__ == "__main__":
    everything = fashion_mnist.load()
    right = targets(everything).argmax(1) == everything.train_labels
    print(f"images labelled rightly by networks that had not seen them: {right.float().mean():.2%}")
