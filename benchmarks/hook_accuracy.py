"""Which accuracy do DDP's own hooks reach, and with how many bytes? N ranks over gloo, on one machine.

    torchrun --nproc-per-node 4 -m benchmarks.hook_accuracy --task lenet300 --seeds 0 1 2
    python -m benchmarks.hook_accuracy --table

The networks, data, schedule and order of the images are those of `benchmarks.convergence`. An arm is
`none` (DDP without a hook), `fp16`, `powersgd,rank=2,start=23` (dense for so many steps), or `dgc` with
changes to its fields as there; each may have `lr=` of its own. Bytes are what a rank hands over in all
steps, against what it does without a hook. A row of JSON is appended for each run, and runs that are
in the file are skipped.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import dgc
from benchmarks.convergence import SCHEDULES, parse_arm, provenance
from benchmarks.convergence_table import read, without_rate
from benchmarks.convergence_tasks import TASKS
from benchmarks.harness import RESULTS, table

KEY = ("task", "arm", "seed", "lr", "epochs", "batch", "workers", "schedule")
ARMS = (
    *("none", "fp16", "powersgd,rank=1,start=2,lr=0.05"),
    *("powersgd,rank=2,start=2", "powersgd,rank=4,start=2"),
    *("dgc,warmup_epochs=0.5,lr=0.2", "dgc,density=0.0035,warmup_epochs=0.1,lr=0.2"),
    "dgc,density=0.0035,warmup_epochs=0.1,value_bits=1,lr=0.2",
)
"""By default: those of README for the task lenet300."""


def fields_of(arm: str) -> dict[str, str]:
    """Example: "powersgd,rank=2,start=23" has {"rank": "2", "start": "23"}."""
    return dict(each.split("=") for each in arm.split(",")[1:])


class Hook:
    """The hook that `arm` names, on `ddp`, whose parameters `sgd` trains."""

    def __init__(
        self, arm: str, ddp: DistributedDataParallel, sgd: Optimizer, steps_per_epoch: int
    ) -> None:
        self.kind, fields = arm.split(",")[0], fields_of(arm)
        self.numel = sum(param.numel() for param in ddp.parameters())
        if self.kind == "dgc":
            config, options = parse_arm(arm, steps_per_epoch)
            assert not options, f"{arm}: only the rate can differ here"
            self.stats = dgc.register(ddp, sgd, config).stats
        elif self.kind == "fp16":
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.kind == "powersgd":
            rank, start = int(fields["rank"]), int(fields["start"])
            self.state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=rank, start_powerSGD_iter=start
            )
            ddp.register_comm_hook(self.state, powerSGD_hook.powerSGD_hook)
        else:
            assert self.kind == "none", f"unknown arm {arm}"

    def ratio(self, steps: int) -> float:
        """Bytes of that many dense steps over those sent."""
        if self.kind == "dgc":
            return float(steps * 4 * self.numel / self.stats()["sent_bytes"])
        if self.kind == "powersgd":
            _, before, after = self.state.compression_stats()
            return float(steps * self.numel / (steps * self.numel - before + after))
        return 2.0 if self.kind == "fp16" else 1.0


def train(args: argparse.Namespace, arm: str, seed: int, lr: float) -> dict[str, Any]:
    """The result of one run; all ranks call it."""
    task, rank, world = TASKS[args.task], dist.get_rank(), dist.get_world_size()
    net, per_epoch = task.model(seed), task.steps(world, args.batch)
    # In one bucket: with several, PowerSGD's chained collectives end a job over gloo.
    ddp = DistributedDataParallel(net, bucket_cap_mb=1024)
    sgd = task.optimizer(net, lr)
    hook = Hook(arm, ddp, sgd, per_epoch)
    total, step, start = args.epochs * per_epoch, 0, time.perf_counter()
    for epoch in range(args.epochs):
        for losses in task.epoch(ddp, world, args.batch, 1_000_003 * (seed + 1) + epoch):
            for group in sgd.param_groups:
                group["lr"] = lr * SCHEDULES[args.schedule](step / total)
            sgd.zero_grad()
            losses[rank]().backward()
            sgd.step()
            step += 1
    final = task.evaluate(net) if rank == 0 else 0.0
    dist.barrier()
    return {
        "final": round(final, 4),
        "ratio": round(hook.ratio(total), 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def wanted(args: argparse.Namespace, workers: int) -> Iterator[dict[str, Any]]:
    """The runs that are asked for and not in the file."""
    done = [tuple(row[key] for key in KEY) for row in read(args.out)]
    for seed in args.seeds:
        for arm in args.arms:
            run = {key: getattr(args, key, None) for key in KEY}
            lr = float(fields_of(arm).get("lr", args.lr))
            run |= {"arm": without_rate(arm), "seed": seed, "lr": lr, "workers": workers}
            if tuple(run[key] for key in KEY) not in done:
                yield run


def report(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds of each arm and rate."""
    arms: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(tuple(row[key] for key in KEY if key != "seed"), []).append(row)
    lines = []
    for (task, arm, lr, epochs, *_), runs in arms.items():
        finals = [run["final"] for run in runs]
        cells = {"task": task, "epochs": epochs, "hook": arm, "lr": lr, "seeds": len(runs)}
        spread = f"{min(finals):.2f} to {max(finals):.2f}"
        ratio = f"1/{mean(run['ratio'] for run in runs):.4g}"
        lines.append({**cells, "accuracy": round(mean(finals), 2), "": spread, "bytes": ratio})
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="lenet300")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=64, help="of one rank")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    parser.add_argument("--out", type=Path, default=RESULTS / "hook_accuracy_cpu2.jsonl")
    parser.add_argument("--table", action="store_true", help="print the results' table")
    args = parser.parse_args()
    if args.table:
        print(report(read(args.out)))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # slower, and no less right
    rt = dgc.init("gloo")
    runs = list(wanted(args, rt.world_size))
    if not runs and rt.rank == 0:
        print(f"{args.out} has these runs: with another --out they run again")
    for run in runs:
        found = train(args, run["arm"], run["seed"], run["lr"])
        if rt.rank == 0:
            row = {**run, **found, **provenance("cpu")}
            row["command"] = "torchrun --nproc-per-node 4 -m benchmarks.hook_accuracy " + " ".join(
                sys.argv[1:]
            )
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                *(f"{key} {row[key]}" for key in (*KEY[:4], "final", "ratio", "seconds")),
                flush=True,
            )
    rt.comm.barrier()
    os._exit(0)  # torch's teardown may hang (docs/log.md, 2026-11-24)


if __name__ == "__main__":
    main()
