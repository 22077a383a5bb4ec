"""What one rank of `benchmarks.bench_step` does: train a net of given shapes, and time its steps.

    torchrun --nproc-per-node 4 -m benchmarks.step_job ARM NET SECONDS OUT

The net has a real net's parameters and next to no compute: the gradient of each layer is a piece of
heavy-tailed noise, new in each step, and appears layer by layer as in a real backward pass.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import dgc
from benchmarks import shapes

_SPARE = 1 << 20
_LEAST, _MOST = 2, 40
COUNTED = (
    "sent_bytes",
    "received_bytes",
    "compress_seconds",
    "exchange_seconds",
    "under_way_seconds",
)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, noise: Tensor) -> Tensor:
        ctx.noise = noise
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.noise * grad, None


class ShapeNet(nn.Module):
    """Parameters of the given shapes; `forward(step)` is a loss with noise as their gradients."""

    def __init__(self, wanted: list[tuple[int, ...]], seed: int, device: str = "cpu") -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(shape, device=device) for shape in wanted])
        self.numels = [p.numel() for p in self.weights]
        drawn = torch.Generator().manual_seed(seed)
        self.noise = (torch.randn(sum(self.numels) + _SPARE, generator=drawn) ** 3).to(device)

    def forward(self, step: int) -> Tensor:
        start = step * 104_729 % _SPARE
        x = torch.ones((), requires_grad=True, device=self.noise.device)
        pieces = self.noise[start : start + sum(self.numels)].split(self.numels)
        for weight, noise in zip(self.weights, pieces, strict=True):
            x = _Layer.apply(x, weight, noise.view_as(weight))
        return x


def stepper(arm: str, net: ShapeNet) -> Any:
    """A training step of `arm`, as a function of the step's number, and its `stats` or None."""
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    kind, _, detail = arm.partition(":")
    if kind == "ddp":
        # PowerSGD in one bucket: with several, its chained collectives run in another order on each
        # rank, and gloo ends the job.
        whole = {"bucket_cap_mb": 1024} if detail.startswith(("powersgd", "dgc-whole")) else {}
        model = DistributedDataParallel(net, gradient_as_bucket_view=True, **whole)
        optimizer: Any = sgd
        stats = None
        if detail == "fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif detail.startswith("powersgd"):
            rank = int(detail.removeprefix("powersgd"))
            options = {"matrix_approximation_rank": rank, "start_powerSGD_iter": 2}
            state = powerSGD_hook.PowerSGDState(None, **options)
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif detail.startswith("dgc"):
            stats = dgc.register(model, sgd, dgc.DGC()).stats
    else:
        config = dgc.Dense() if detail == "dense" else dgc.DGC(**json.loads(detail or "{}"))
        model = net
        optimizer = dgc.DistributedOptimizer(sgd, net.named_parameters(), config)
        stats = optimizer.stats

    def run(step: int) -> None:
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()

    return run, stats


def received_bytes() -> int | None:
    """By this host's link so far; None where there is none."""
    counter = Path("/sys/class/net/eth0/statistics/rx_bytes")
    return int(counter.read_text()) if counter.exists() and "EMULATED_HOSTS" in os.environ else None


def main() -> None:
    arm, name, seconds, out = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rt = dgc.init("mpi" if arm.startswith("mpi") else "gloo")
    net = ShapeNet(getattr(shapes, name)(), rt.rank)
    run, stats = stepper(arm, net)
    untimed = 5 if "powersgd" in arm else 2  # PowerSGD compresses from its third step on
    for step in range(untimed):
        run(step)
    rt.comm.barrier()
    before, link = stats() if stats else {}, received_bytes()
    times: list[float] = []
    wanted = _LEAST
    while len(times) < wanted:
        start = time.perf_counter()
        run(untimed + len(times))
        times.append(time.perf_counter() - start)
        if len(times) == 2:  # all ranks agree on how many more
            longest = rt.comm.all_gather(torch.tensor([sum(times) / 2])).wait().max()
            wanted = max(_LEAST, min(_MOST, int(float(seconds) / float(longest))))
    rt.comm.barrier()
    if rt.rank == 0:
        row: dict[str, Any] = {"seconds": median(times), "steps": len(times)}
        row["fastest"], row["slowest"] = min(times), max(times)
        if link is not None:
            row["link_bytes"] = (received_bytes() - link) / len(times)
        if stats:
            after = stats()
            for key in COUNTED:
                row[key] = (after[key] - before[key]) / len(times)
            row["overlap"] = 1 - row["exchange_seconds"] / row["under_way_seconds"]
            row["pattern"] = after["pattern"]
        Path(out).write_text(json.dumps(row))
    sys.stdout.flush()
    rt.comm.barrier()
    if arm.startswith("mpi"):
        rt.close()
    else:
        os._exit(0)  # torch's teardown may hang (docs/log.md, 2026-11-24)


if __name__ == "__main__":
    main()
