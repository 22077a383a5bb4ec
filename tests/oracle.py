"""N workers in float64 with slow loops: the definition that the library is held against.

Tensors are lists of floats by parameter name. Values travel unrounded (32 bits).
"""

import math
from dataclasses import dataclass, field

from dgc.config import DGC

Gradients = dict[str, list[float]]


@dataclass
class Sgd:
    """The options of one param group."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    dampening: float = 0.0
    weight_decay: float = 0.0


@dataclass
class Oracle:
    """The parameters, and for each worker u and v."""

    params: Gradients
    sgd: dict[str, Sgd]
    config: DGC
    workers: int
    step_number: int = 0
    u: list[Gradients] = field(default_factory=list)
    v: list[Gradients] = field(default_factory=list)
    shared: Gradients = field(default_factory=dict)
    """The momentum that is the same on all workers: of weight decay, or all of it."""

    def __post_init__(self) -> None:
        self.u = [self._zeros() for _ in range(self.workers)]
        self.v = [self._zeros() for _ in range(self.workers)]

    def _zeros(self) -> Gradients:
        return {name: [0.0] * len(p) for name, p in self.params.items()}

    def density(self) -> float:
        config, density, stages = self.config, self.config.warmup_density, []
        while density > config.density * (1 + 1e-9):
            stages.append(density)
            density /= 4
        if self.step_number >= config.warmup_steps or not stages:
            return config.density
        return stages[self.step_number * len(stages) // config.warmup_steps]

    def step(self, gradients: list[Gradients]) -> None:
        """One step; `gradients[i]` is what worker i found."""
        arrived = self._zeros()
        for worker, grads in enumerate(gradients):
            factor = self._clip_factor(grads)
            for name, g in grads.items():
                sent = self._send(worker, name, [factor * x for x in g])
                for index, value in sent.items():
                    arrived[name][index] += value / self.workers
        for name in self.params:
            self._apply(name, arrived[name])
        self.step_number += 1

    def _clip_factor(self, grads: Gradients) -> float:
        if self.config.clip_norm is None:
            return 1.0
        norm = math.sqrt(sum(x * x for g in grads.values() for x in g))
        return min(1.0, self.config.clip_norm / math.sqrt(self.workers) / norm)

    def _send(self, worker: int, name: str, g: list[float]) -> dict[int, float]:
        config, sgd = self.config, self.sgd[name]
        u, v = self.u[worker][name], self.v[worker][name]
        rate = sgd.lr if config.fold_lr else 1.0
        gain = self._gain(sgd)
        for j, x in enumerate(g):
            if not config.momentum_correction:
                entering = x
            elif sgd.nesterov:
                u[j] = sgd.momentum * u[j] + gain * x
                entering = gain * x + sgd.momentum * u[j]
            else:
                u[j] = sgd.momentum * u[j] + gain * x
                entering = u[j]
            v[j] += rate * entering
        k = self._count(len(v))
        order = sorted(range(len(v)), key=lambda j: (-abs(v[j]), j))
        sent = {j: v[j] for j in order[:k]}
        for j in sent:
            v[j] = 0.0
            if config.momentum_masking:
                u[j] = 0.0
        if not config.local_accumulation:
            v[:] = [0.0] * len(v)
        return sent

    def _count(self, numel: int) -> int:
        """How many of so many elements a worker sends."""
        wanted = math.ceil(round(self.density() * numel, 9))
        return min(numel, max(self.config.min_selected, wanted))

    def _gain(self, sgd: Sgd) -> float:
        return 1.0 if self.step_number == 0 else 1 - sgd.dampening

    def _apply(self, name: str, arrived: list[float]) -> None:
        sgd, p = self.sgd[name], self.params[name]
        own = self.config.momentum_correction
        if self.config.fold_lr:
            arrived = [x / sgd.lr for x in arrived]
        buffer = self.shared.get(name)
        d = [sgd.weight_decay * w + (0 if own else x) for w, x in zip(p, arrived, strict=True)]
        if buffer is None:
            buffer = list(d)
        else:
            gain = 1 - sgd.dampening
            buffer = [sgd.momentum * b + gain * x for b, x in zip(buffer, d, strict=True)]
        self.shared[name] = buffer
        whole = self._count(len(p)) == len(p)
        senders = self.workers if whole else 1
        for j in range(len(p)):
            direction = d[j] + sgd.momentum * buffer[j] if sgd.nesterov else buffer[j]
            p[j] -= sgd.lr * (direction + (arrived[j] if own else 0.0))
            if own and self.config.momentum_masking and arrived[j] != 0:
                buffer[j] *= 1 - senders / self.workers


@dataclass
class AdamWOracle(Oracle):
    """AdamW: a worker's gradient over the root of its own second moment; what arrives is a step."""

    beta2: float = 0.99
    eps: float = 0.1
    second: list[Gradients] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.second = [self._zeros() for _ in range(self.workers)]

    def _send(self, worker: int, name: str, g: list[float]) -> dict[int, float]:
        second, correction = self.second[worker][name], 1 - self.beta2 ** (self.step_number + 1)
        entering = []
        for j, x in enumerate(g):
            second[j] = self.beta2 * second[j] + (1 - self.beta2) * x * x
            entering.append(x / (math.sqrt(second[j] / correction) + self.eps))
        return super()._send(worker, name, entering)

    def _apply(self, name: str, arrived: list[float]) -> None:
        sgd, p = self.sgd[name], self.params[name]
        rate = 1.0 if self.config.fold_lr else sgd.lr
        for j, x in enumerate(arrived):
            p[j] -= sgd.lr * sgd.weight_decay * p[j] + rate * math.sqrt(self.workers) * x
