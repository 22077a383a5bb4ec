"""What does the whole sender cost beside the bare momentum update that dense training makes anyway?

    python -m benchmarks.bench_sender [--rounds 15] [--device cuda]

One step on 25,557,032 elements, density 0.001, 4-bit values, as one tensor and as ResNet-50's 161.
All rows are called in turn, medians over the rounds. The gradients of four steps are used in turn,
after thirty steps that let the residual grow.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from benchmarks.harness import medians_ms, peak_bytes, save, setup, table
from benchmarks.shapes import resnet50
from dgc.core import kernels
from dgc.core.layout import Layout
from dgc.core.select import ChunkedTopK, ExactTopK, Selector, ThresholdTopK, num_selected
from dgc.train import wire

NUMEL = 25_557_032
DENSITY = 0.001
VALUE_BITS = 4
SETTLE_STEPS = 30


def gradient(seed: int) -> Tensor:
    """Heavy-tailed: a normal times a log-normal scale that each element keeps from step to step."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).exp_()
    return torch.randn(NUMEL, generator=generator).mul_(scale)


@dataclass
class Sender:
    """One rank's memory, and the step that `dgc.train.step.send_` makes of it."""

    selector: Selector
    numels: Sequence[int]
    gradients: Sequence[Sequence[Tensor]]
    dtype: torch.dtype = torch.float32
    step: int = 0
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        device = self.gradients[0][0].device
        self.layout = Layout.of(self.numels, device)
        self.u = torch.zeros(NUMEL, dtype=self.dtype, device=device)
        self.v = torch.zeros_like(self.u)
        self.update = torch.tensor([[0.9, 1.0, 0.1, 0.0]]).repeat(len(self.numels), 1)
        self.counts = [num_selected(numel, DENSITY) for numel in self.numels]
        self.bytes = wire.max_message_bytes(self.numels, self.counts, VALUE_BITS, device)
        self.state = self.selector.state(self.layout)

    def __call__(self) -> None:
        self.step += 1
        grads = self.gradients[self.step % len(self.gradients)]
        seeds = kernels.seed_of(self.step, 0), kernels.seed_of(self.step, 1)
        finite, batch = self.selector.accumulate_select_(
            grads, self.u, self.v, self.layout, self.update, self.counts, self.state, seeds[0]
        )
        _, sent = wire.encode_batch(batch, VALUE_BITS, message_bytes=self.bytes, finite=finite)
        kernels.release_(self.u, self.v, self.layout, batch, sent, masking=True, seed=seeds[1])

    def accumulate(self) -> None:
        self.step += 1
        grads = self.gradients[self.step % len(self.gradients)]
        kernels.accumulate_(
            grads, self.u, self.v, self.layout, self.update, kernels.seed_of(self.step)
        )


def bare_update(gradients: Sequence[Tensor]) -> Callable[[], None]:
    u, v = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    turn = [0]

    def update() -> None:
        turn[0] += 1
        u.mul_(0.9).add_(gradients[turn[0] % len(gradients)])
        v.add_(u)

    return update


def parts(sender: Sender) -> dict[str, Callable[[], object]]:
    """The stages of a step, each on its own, on a copy of the state of `sender`."""
    grads, v = sender.gradients[0], sender.v.clone()
    idle = Sender(sender.selector, sender.numels, sender.gradients)
    batch = ExactTopK().select_(v, sender.layout, sender.counts, None)
    nothing = torch.zeros_like(batch.values)

    def encode() -> object:
        return wire.encode_batch(batch, VALUE_BITS, message_bytes=sender.bytes)

    def release() -> None:
        kernels.release_(None, v, sender.layout, batch, nothing, masking=False)

    return {
        "part: squared norm of the gradients": lambda: kernels.squared_norm(grads),
        "part: accumulate, with its check for finite": idle.accumulate,
        "part: quantise and encode": encode,
        "part: release": release,
    }


def measure(
    numels: Sequence[int], rounds: int, device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Times in milliseconds; and memory beside u and v, in percent of theirs in their dtype."""
    whole = [gradient(seed).to(device) for seed in range(1, 5)]
    split = [[part.clone() for part in g.split(list(numels))] for g in whole]
    senders = {
        "sender, threshold": Sender(ThresholdTopK(), numels, split),
        "sender, exact": Sender(ExactTopK(), numels, split),
        "sender, chunks of 4096": Sender(ChunkedTopK(), numels, split),
        "sender, threshold, bf16 state": Sender(ThresholdTopK(), numels, split, torch.bfloat16),
    }
    for sender in senders.values():
        for _ in range(SETTLE_STEPS):
            sender()
    half = torch.empty(NUMEL, dtype=torch.float16, device=device)
    flat = senders["sender, exact"].v
    k = num_selected(NUMEL, DENSITY)
    others = {
        "bare update: u.mul_(m).add_(g); v.add_(u)": bare_update(whole),
        "16-bit: cast the gradient to fp16 and back": lambda: whole[0].copy_(half.copy_(whole[1])),
        "torch.topk(|v|, k), for comparison": lambda: torch.topk(flat.abs(), k, sorted=False),
    }
    stages = parts(senders["sender, threshold"])
    times = medians_ms({**others, **senders, **stages}, rounds)
    memory = {
        name: 100 * peak_bytes(sender, device) / (sender.u.nbytes + sender.v.nbytes)
        for name, sender in senders.items()
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
    parser.add_argument("--save", default="sender_cpu2")
    arguments = parser.parse_args()
    print(setup())
    how = arguments.rounds, arguments.device
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
    print(save(arguments.save, {"rows": found, "shapes": shapes}))


if __name__ == "__main__":
    main()
