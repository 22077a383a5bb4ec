"""What does a whole `step()` cost beside the network, from finished gradients to new parameters?

    python -m benchmarks.bench_optimizer [--rounds 15] [--device cuda]

One rank, so nothing travels; 25,557,032 float32 elements as one tensor and as ResNet-50's 161,
density 0.001, 4-bit values, weight decay, SGD with Nesterov momentum and AdamW. All rows are called in
turn, medians over the rounds, after thirty steps that let the residual grow. A step overwrites the
gradients, so each row copies new ones first; the time of that is a row, and taken off the others.
"""

import argparse
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.bench_sender import NUMEL, SETTLE_STEPS, bare_update, gradient
from benchmarks.harness import medians_ms, peak_bytes, save, setup, table
from benchmarks.shapes import resnet50
from dgc import DGC, DistributedOptimizer

COPY = "copying gradients"
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
    "AdamW": (AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}


class Steps:
    """The steps of one optimizer, each with new gradients."""

    def __init__(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        self.gradients, self.turn = gradients, 0
        self.params = [Parameter(torch.zeros_like(g)) for g in gradients[0]]
        self.step: Callable[[], Any] = lambda: None
        for param in self.params:
            param.grad = torch.empty_like(param)

    def with_(self, kind: type[Optimizer], **options: Any) -> "Steps":
        self.step = kind(self.params, **options).step  # type: ignore[call-arg]
        return self

    def compressed(self, kind: type[Optimizer], **options: Any) -> "Steps":
        named = [(str(i), param) for i, param in enumerate(self.params)]
        inner = kind(self.params, **options)  # type: ignore[call-arg]
        self.step = DistributedOptimizer(inner, named, DGC()).step
        return self

    def __call__(self) -> None:
        self.turn += 1
        fresh = self.gradients[self.turn % len(self.gradients)]
        with torch.no_grad():
            for param, grad in zip(self.params, fresh, strict=True):
                assert param.grad is not None
                param.grad.copy_(grad)
        self.step()


def measure(numels: Sequence[int], rounds: int, device: str) -> list[dict[str, object]]:
    """One row for each way to step."""
    whole = [gradient(seed).to(device) for seed in range(1, 5)]
    split = [[part.clone() for part in g.split(list(numels))] for g in whole]
    arms = {COPY: Steps(split)}
    for name, (kind, options) in OPTIMIZERS.items():
        arms[f"{name}, torch"] = Steps(split).with_(kind, **options)
        arms[f"{name}, torch, fused"] = Steps(split).with_(kind, fused=True, **options)
        arms[f"{name}, dgc"] = Steps(split).compressed(kind, **options)
    for arm in arms.values():
        for _ in range(SETTLE_STEPS):
            arm()
    bare = "bare update: u.mul_(m).add_(g); v.add_(u)"
    times = medians_ms({bare: bare_update(whole), **arms}, rounds)
    peaks = {name: peak_bytes(arm, device) / (4 * NUMEL) for name, arm in arms.items()}
    rows = []
    for name, ms in times.items():
        ms -= times[COPY] if name in arms and name != COPY else 0
        memory = round(peaks[name], 2) if name in peaks else ""
        rows.append(
            {
                "layout": "1 tensor" if len(numels) == 1 else f"{len(numels)} tensors",
                "what": name,
                "ms": round(ms, 2),
                "× bare update": round(ms / times[bare], 2),
                "memory while it runs, × parameters": memory,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--save", help="optimizer_cpu2 by default, or optimizer_cuda")
    arguments = parser.parse_args()
    print(setup())
    how = arguments.rounds, arguments.device
    rows = measure([NUMEL], *how) + measure([prod(shape) for shape in resnet50()], *how)
    print(table(rows))
    name = arguments.save or f"optimizer_{'cpu2' if arguments.device == 'cpu' else 'cuda'}"
    print(save(name, {"rows": rows}))


if __name__ == "__main__":
    main()
