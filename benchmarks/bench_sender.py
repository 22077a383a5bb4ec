"""What does the whole sender cost beside the bare momentum update that dense training makes anyway?

    python -m benchmarks.bench_sender [--rounds 15] [--device cuda] [--density 0.0035 --value-bits 1]

One step on 25,557,032 elements, as one tensor and as ResNet-50's 161.
All rows are called in turn, medians over the rounds. The gradients of four steps are used in turn,
after thirty steps that let the residual grow.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from benchmarks.harness import medians_ms, peak_bytes, save, setup, table
from benchmarks.shapes import resnet50
from dgc.config import DGC
from dgc.core import kernels
from dgc.core.layout import Layout
from dgc.core.select import ChunkedTopK, ExactTopK, ThresholdTopK, num_selected
from dgc.train import wire
from dgc.train.arrive import Expected
from dgc.train.memory import Memory
from dgc.train.recorded import Receiver, Sender
from dgc.train.step import message_plan

NUMEL = 25_557_032
SETTLE_STEPS = 30
RANKS = 4


def gradient(seed: int) -> Tensor:
    """Heavy-tailed: a normal times a log-normal scale that each element keeps from step to step."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).exp_()
    return torch.randn(NUMEL, generator=generator).mul_(scale)


class Rank:
    """One rank's memory, and its steps as training makes them."""

    def __init__(
        self, config: DGC, numels: Sequence[int], gradients: Sequence[Sequence[Tensor]]
    ) -> None:
        self.numels, self.gradients, self.step = numels, gradients, 0
        self.memory = Memory(Layout.of(numels, gradients[0][0].device), config)
        self.sender = Sender(self.memory)
        self.update = torch.tensor([[0.9, 1.0, 0.1, 0.0]]).repeat(len(numels), 1)

    def next(self) -> Sequence[Tensor]:
        self.step += 1
        self.memory.begin(self.step)
        return self.gradients[self.step % len(self.gradients)]

    def __call__(self) -> Tensor:
        used = [True] * len(self.numels)
        density = self.memory.config.density
        return self.sender.send_(self.next(), self.update, density, used)[0]

    def accumulate(self) -> None:
        memory = self.memory
        kernels.accumulate_(
            self.next(), memory.u, memory.v, memory.layout, self.update, memory.seed()
        )


def bare_update(gradients: Sequence[Tensor]) -> Callable[[], None]:
    u, v = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    turn = [0]

    def update() -> None:
        turn[0] += 1
        u.mul_(0.9).add_(gradients[turn[0] % len(gradients)])
        v.add_(u)

    return update


def parts(rank: Rank) -> dict[str, Callable[[], object]]:
    """The stages of a step, each on its own, on a copy of the state of `rank`."""
    grads, v, layout = rank.gradients[0], rank.memory.v.clone(), rank.memory.layout
    config = rank.memory.config
    idle, bits = Rank(config, rank.numels, rank.gradients), config.value_bits
    counts, size = message_plan(layout.numels, config.density, config, v.device)
    batch = ExactTopK().select_(v, layout, counts, None)
    nothing = torch.zeros_like(batch.values)
    gathered = torch.stack([rank().clone() for _ in range(RANKS)])
    means = [torch.empty_like(grad) for grad in grads]
    scales, expected = [1 / RANKS] * len(means), Expected(bits, sum(counts))
    receiver = Receiver()
    return {
        "part: squared norm of the gradients": lambda: kernels.squared_norm(grads),
        "part: accumulate, with its check for finite": idle.accumulate,
        "part: quantise and encode": lambda: wire.encode_batch(batch, bits, message_bytes=size),
        "part: release": lambda: kernels.release_(None, v, layout, batch, nothing, masking=False),
        f"receive {RANKS} messages": lambda: receiver.receive_(gathered, means, scales, expected),
    }


def measure(
    numels: Sequence[int], config: DGC, rounds: int, device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Times in milliseconds; and memory beside u and v, in percent of theirs in their dtype."""
    whole = [gradient(seed).to(device) for seed in range(1, 5)]
    split = [[part.clone() for part in g.split(list(numels))] for g in whole]
    configs = {
        "sender, threshold": config,
        "sender, exact": replace(config, selector=ExactTopK()),
        "sender, chunks of 4096": replace(config, selector=ChunkedTopK()),
        "sender, threshold, bf16 state": replace(config, state_dtype=torch.bfloat16),
    }
    senders = {name: Rank(each, numels, split) for name, each in configs.items()}
    if device != "cpu":
        senders["sender, threshold, not recorded"] = Rank(config, numels, split)
        senders["sender, threshold, not recorded"].sender.recorder.unrecorded = sys.maxsize
    for sender in senders.values():
        for _ in range(SETTLE_STEPS):
            sender()
    half = torch.empty(NUMEL, dtype=torch.float16, device=device)
    flat = senders["sender, exact"].memory.v
    k = num_selected(NUMEL, config.density)
    others = {
        "bare update: u.mul_(m).add_(g); v.add_(u)": bare_update(whole),
        "16-bit: cast the gradient to fp16 and back": lambda: whole[0].copy_(half.copy_(whole[1])),
        "torch.topk(|v|, k), for comparison": lambda: torch.topk(flat.abs(), k, sorted=False),
    }
    stages = parts(senders["sender, threshold"])
    times = medians_ms({**others, **senders, **stages}, rounds)
    memory = {
        name: 100 * peak_bytes(sender, device) / (2 * sender.memory.v.nbytes)
        for name, sender in senders.items()
        if not sender.sender.recorder.recorded  # what a graph holds, it holds all the time
    }
    return times, memory


TARGETS = {"sender, threshold": 1.5, "sender, exact": 4.0, "sender, threshold, bf16 state": 1.5}


def rows(layout: str, times: dict[str, float], memory: dict[str, float]) -> list[dict[str, object]]:
    base = next(iter(times.values()))
    return [
        {
            "layout": layout,
            "what": name,
            "ms": round(ms, 2),
            "× bare update": round(ms / base, 3),
            "target ≤": TARGETS.get(name, ""),
            "memory beside u, v, %": round(memory[name], 2) if name in memory else "",
            "limit %": 5.0 if name in TARGETS else "",
        }
        for name, ms in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--value-bits", type=int, default=4)
    parser.add_argument("--save", help="sender_cpu2 by default, or sender_cuda")
    arguments = parser.parse_args()
    print(setup())
    config = DGC(
        density=arguments.density, value_bits=arguments.value_bits, selector=ThresholdTopK()
    )
    how = config, arguments.rounds, arguments.device
    one, one_memory = measure([NUMEL], *how)
    many, many_memory = measure([prod(shape) for shape in resnet50()], *how)
    found = rows("1 tensor", one, one_memory) + rows("161 tensors", many, many_memory)
    print(table(found))
    base = next(iter(one))
    shapes = [
        {
            "what": f"{name}: 161 tensors against one, each × its bare update",
            "ratio": round(many[name] / many[base] / (one[name] / one[base]), 3),
            "target ≤": 1.2,
        }
        for name in TARGETS
    ]
    print(table(shapes))
    name = arguments.save or ("sender_cpu2" if arguments.device == "cpu" else "sender_cuda")
    print(save(name, {"rows": found, "shapes": shapes}))


if __name__ == "__main__":
    main()
