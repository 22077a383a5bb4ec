"""What is trained: networks, data, and how they are judged."""

import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from launch.fashion_mnist import Data, load
from launch.models import build

Loss = Callable[[], Tensor]
CPU = torch.device("cpu")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class Task(Protocol):
    """A network and its data."""

    metric: str
    """What `evaluate` gives: "accuracy", in percent, or "perplexity"."""

    clip: float | None
    """Norm to which dense training clips the mean gradient; None does not clip."""

    def model(self, seed: int) -> nn.Module: ...

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer: ...

    def example(self, batch: int) -> Tensor:
        """What the network is given in a step of one worker, in shape and dtype."""
        ...

    def steps(self, workers: int, batch: int) -> int:
        """Training steps in an epoch."""
        ...

    def epoch(self, model: nn.Module, workers: int, batch: int, seed: int) -> Iterator[list[Loss]]:
        """The losses of all workers, step by step; the order depends on `seed` alone."""
        ...

    def evaluate(self, model: nn.Module) -> float: ...


class Images:
    """A network of launch/models.py on Fashion-MNIST, with SGD, Nesterov momentum 0.9, weight decay."""

    metric, clip = "accuracy", None

    def __init__(self, name: str) -> None:
        self.name = name

    def model(self, seed: int) -> nn.Module:
        return build(self.name, seed).to(memory_format=torch.channels_last)

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return SGD(
            model.parameters(),
            lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
        )

    def example(self, batch: int) -> Tensor:
        return _images(CPU).train_images[:batch]

    def steps(self, workers: int, batch: int) -> int:
        return len(_images(CPU).train_labels) // (workers * batch)

    def epoch(self, model: nn.Module, workers: int, batch: int, seed: int) -> Iterator[list[Loss]]:
        data = _images(_device(model))
        images, labels = data.train_images, data.train_labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        model.train()
        for picked in order.to(labels.device).split(workers * batch)[: self.steps(workers, batch)]:
            yield [
                lambda own=own: F.cross_entropy(model(images[own]), labels[own])
                for own in picked.split(batch)
            ]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        data = _images(_device(model))
        model.eval()
        hits = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(data.test_images.split(500), data.test_labels.split(500), strict=True)
        )
        return 100 * hits / len(data.test_labels)


@lru_cache
def _images(device: torch.device) -> Data:
    return Data(*(each.to(device) for each in load()))


class Teacher:
    """A perceptron that learns the classes which a random two-layer network gives to random inputs.

    Needs no data and takes seconds: the regression test's task, and a first look at an idea.
    """

    metric, clip = "accuracy", None

    def __init__(self, steps: int = 300) -> None:
        self._steps = steps

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return SGD(model.parameters(), lr, momentum=0.9)

    def example(self, batch: int) -> Tensor:
        return torch.zeros(batch, 16)

    def steps(self, workers: int, batch: int) -> int:
        return self._steps

    def epoch(self, model: nn.Module, workers: int, batch: int, seed: int) -> Iterator[list[Loss]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self._steps):
            inputs = torch.randn(workers, batch, 16, generator=generator)
            pairs = zip(inputs, self._classes(inputs), strict=True)
            yield [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in pairs]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        inputs = torch.randn(8192, 16, generator=torch.Generator().manual_seed(1))
        hits = model(inputs).argmax(1) == self._classes(inputs)
        return 100 * float(hits.float().mean())

    def _classes(self, inputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(16, 32, generator=generator) / 4
        return (torch.relu(inputs @ first) @ torch.randn(32, 10, generator=generator)).argmax(-1)


class Text:
    """A byte-level language model on the sources of Python's standard library."""

    metric = "perplexity"

    def __init__(
        self,
        network: Callable[[], nn.Module],
        optimizer: Callable[[nn.Module, float], Optimizer],
        length: int,
        steps: int,
        clip: float | None = None,
    ) -> None:
        self.network, self.optimizer, self.length, self._steps = network, optimizer, length, steps
        self.clip = clip

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.network()

    def example(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.length, dtype=torch.int64)

    def steps(self, workers: int, batch: int) -> int:
        return self._steps

    def epoch(self, model: nn.Module, workers: int, batch: int, seed: int) -> Iterator[list[Loss]]:
        model.train()
        text, generator = _text(_device(model))[0], torch.Generator().manual_seed(seed)
        for _ in range(self._steps):
            starts = torch.randint(
                len(text) - self.length, (workers, batch), generator=generator
            ).to(text.device)
            yield [lambda own=own: self._loss(model, text, own) for own in starts.unbind()]

    def _loss(self, model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
        window = text[starts[:, None] + torch.arange(self.length + 1, device=text.device)].long()
        return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        model.eval()
        text = _text(_device(model))[1]
        starts = torch.arange(0, len(text) - self.length - 1, self.length, device=text.device)
        total = sum(len(own) * self._loss(model, text, own) for own in starts.split(64))
        return float(torch.exp(torch.as_tensor(total / len(starts))))


@lru_cache
def _text(device: torch.device) -> tuple[Tensor, Tensor]:
    """Bytes to train on and to judge by: every 20th file is kept for judging, its first 2 KB."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [path.read_bytes() for path in paths]
    train = b"".join(file for i, file in enumerate(files) if i % 20)
    test = b"".join(file[:2000] for i, file in enumerate(files) if i % 20 == 0)
    whole = [torch.frombuffer(bytearray(t), dtype=torch.uint8).to(device) for t in (train, test)]
    return whole[0], whole[1]


class LSTM(nn.Module):
    """One layer of 256 cells: 526,080 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 96)
        self.lstm = nn.LSTM(96, 256, batch_first=True)
        self.out = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(x))[0])


class GPT(nn.Module):
    """Three pre-norm layers of width 128, learned positions, tied output."""

    def __init__(self, width: int = 128, layers: int = 3, length: int = 128) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T


class Block(nn.Module):
    """Causal self-attention with four heads, and a perceptron of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _sgd(model: nn.Module, lr: float) -> Optimizer:
    return SGD(model.parameters(), lr, momentum=0.9)


def _adamw(model: nn.Module, lr: float) -> Optimizer:
    return AdamW(model.parameters(), lr, weight_decay=0.1)


TASKS: dict[str, Task] = {
    "teacher": Teacher(),
    "lenet5": Images("lenet5"),
    "lenet300": Images("lenet300"),
    "resnet20": Images("resnet20"),
    "lstm": Text(LSTM, _sgd, length=64, steps=200, clip=1.0),
    "gpt": Text(GPT, _adamw, length=128, steps=100),
    "gpt64": Text(lambda: GPT(64, 2, 64), _adamw, length=64, steps=100),
}
