"""What does a communication hook cost on a GPU, beside the network? One rank: nothing travels.

    python -m benchmarks.bench_hooks [--rounds 60]

ResNet-50's 161 parameters with next to no compute, over NCCL, so that a step is what the host and
the GPU do around the exchange. PowerSGD has all in one of DDP's buckets, the others have those of
25 MB unless said otherwise; dgc has 25 MB in each of its own. All arms are called in turn, medians
over the rounds.
"""

import argparse
import tempfile

import torch.distributed as dist

from benchmarks import shapes
from benchmarks.harness import medians_ms, save, setup, table
from benchmarks.step_job import ShapeNet, stepper

ARMS = {
    "no hook": "ddp",
    "fp16": "ddp:fp16",
    "PowerSGD, rank 1": "ddp:powersgd1",
    "PowerSGD, rank 2": "ddp:powersgd2",
    "dgc": "ddp:dgc",
    "dgc, all in one of DDP's buckets": "ddp:dgc-whole",
}
SETTLE_STEPS = 10


class Steps:
    """The steps of one arm, one after the other."""

    def __init__(self, arm: str) -> None:
        self.run, _ = stepper(arm, ShapeNet(shapes.resnet50(), 0, "cuda"))
        self.step = 0
        for _ in range(SETTLE_STEPS):
            self()

    def __call__(self) -> None:
        self.run(self.step)
        self.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", default="hooks_cuda")
    arguments = parser.parse_args()
    print(setup())
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("nccl", init_method=f"file://{file.name}", rank=0, world_size=1)
        times = medians_ms({name: Steps(arm) for name, arm in ARMS.items()}, arguments.rounds)
        dist.destroy_process_group()
    base = times["no hook"]
    rows = [
        {"hook": name, "ms a step": round(ms, 2), "ms more than none": round(ms - base, 2)}
        for name, ms in times.items()
    ]
    print(table(rows))
    print(save(arguments.save, {"rows": rows}))


if __name__ == "__main__":
    main()
