"""Does compressed training reach the accuracy of dense training?

N workers train in one process over the real pipeline. Arms are paired: a seed fixes the initial
weights and the order of the data in all of them. A row of JSON is appended for each run; runs that
are in the file already are skipped.

    python -m benchmarks.convergence --task lenet5 --arms dense dgc paper --seeds 0 1 2 --epochs 5
    python -m benchmarks.convergence --task resnet20 --device cuda --epochs 10 --lr 0.1
    python -m benchmarks.convergence --table
    python -m benchmarks.convergence --picture docs/accuracy.png

An arm is `dense`, `dgc` or `paper`, and changes to the fields of its configuration, with
`warmup_epochs` for the warm-up, and to options of the optimizer, `lr`, `momentum` and
`weight_decay`: `dgc,value_bits=32,warmup_epochs=0.5,lr=0.03`; a dtype by its name,
`state_dtype=bfloat16`. That warm-up is of the density; with `--schedule warmup-cosine` the rate
rises over the first twentieth.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Callable, Mapping
from copy import deepcopy
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.convergence_table import RESULTS, picture, read, table, without_rate
from benchmarks.convergence_tasks import TASKS, Task
from benchmarks.convergence_world import World
from dgc.config import DGC, Compression, Dense
from dgc.errors import GradientError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "warmup-cosine": lambda done: min(1, 20 * done) * 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
}
OPTIONS = ("lr", "momentum", "weight_decay")
KEY = ("task", "arm", "seed", "workers", "batch", "epochs", "schedule", "lr")


def parse_arm(arm: str, steps_per_epoch: int) -> tuple[Compression, dict[str, float]]:
    """The configuration that an arm names, and the optimizer's options that it changes."""
    base, *changes = arm.split(",")
    fields: dict[str, Any] = {k: _value(v) for k, v in (each.split("=") for each in changes)}
    options = {key: fields.pop(key) for key in OPTIONS if key in fields}
    if "warmup_epochs" in fields:
        fields["warmup_steps"] = round(fields.pop("warmup_epochs") * steps_per_epoch)
    if base == "dense":
        return Dense(**fields), options
    if base == "paper":
        return DGC.paper(**{"warmup_steps": 0, **fields}), options
    assert base == "dgc", f"unknown arm {arm}"
    return DGC(**fields), options


def _value(text: str) -> Any:
    dtype = getattr(torch, text, None)
    return dtype if isinstance(dtype, torch.dtype) else literal_eval(text)


class Trained(NamedTuple):
    """A run's end; `curve` is shorter than the epochs if it diverged."""

    world: World
    model: torch.nn.Module
    curve: list[float]
    steps: int
    seconds: float


def train(
    task: Task,
    config: Compression,
    *,
    seed: int,
    workers: int,
    batch: int,
    epochs: int,
    lr: float,
    schedule: str = "cosine",
    options: Mapping[str, float] = MappingProxyType({}),
    device: str = "cpu",
    note: str = "",
) -> Trained:
    """Train once; `note` is printed with the progress, if it is not empty.

    `options` are the optimizer's, in place of the task's.
    """
    model = task.model(seed).to(device)
    if torch.device(device).type == "cuda":
        record(model, task.example(batch).to(device))
    optimizer = task.optimizer(model, lr)
    for group in optimizer.param_groups:
        assert options.keys() <= group.keys(), f"{type(optimizer).__name__} has no {dict(options)}"
        group.update(options)
    world = World(model, optimizer, config, workers)
    total, step, start = epochs * task.steps(workers, batch), 0, time.perf_counter()
    clip = task.clip if isinstance(config, Dense) else None  # DGC clips by its own clip_norm
    curve: list[float] = []
    for epoch in range(epochs):
        loss = 0.0
        try:
            for losses in task.epoch(model, workers, batch, 1_000_003 * (seed + 1) + epoch):
                for group in world.optimizer.param_groups:
                    group["lr"] = lr * SCHEDULES[schedule](step / total)
                loss += world.step(losses, clip)
                step += 1
        except GradientError:
            break
        curve.append(round(task.evaluate(model), 4))
        if note:
            mean, spent = loss / total * epochs, time.perf_counter() - start
            print(f"{note} epoch {epoch + 1}/{epochs}: loss {mean:.4f}", end=" ")
            print(f"{task.metric} {curve[-1]:.3f} {spent:.0f} s", flush=True)
    return Trained(world, model, curve, step, round(time.perf_counter() - start, 1))


def record(model: torch.nn.Module, example: Tensor) -> None:
    """Make forward and backward passes of the training mode CUDA graphs: launches take longer."""
    before = deepcopy(model.state_dict())
    torch.cuda.make_graphed_callables(model, (example,))  # also runs it, which moves statistics
    model.load_state_dict(before)


def run(args: argparse.Namespace, arm: str, seed: int, lr: float) -> dict[str, Any]:
    """The row of one arm."""
    task = TASKS[args.task]
    config, options = parse_arm(arm, task.steps(args.workers, args.batch))
    setting = {key: getattr(args, key) for key in ("workers", "batch", "epochs", "schedule")}
    setting |= {"seed": seed, "lr": options.pop("lr", lr)}
    note = f"{args.task} {arm} seed {seed}"
    done = train(task, config, **setting, options=options, device=args.device, note=note)
    diverged = len(done.curve) < args.epochs
    linear = isinstance(done.world.optimizer.optimizer, torch.optim.SGD)
    return {
        "task": args.task,
        "arm": arm,
        **setting,
        "steps": done.steps,
        "metric": task.metric,
        "curve": done.curve,
        "final": None if diverged else done.curve[-1],
        "flushed": None if diverged or not linear else round(flushed(done, task), 4),
        "config": config.describe().split("\n"),
        "stats": done.world.optimizer.stats(),
        "seconds": done.seconds,
    }


@torch.no_grad()
def flushed(done: Trained, task: Task) -> float:
    """The result if the mean of all residuals were applied at the end; the model is changed."""
    optimizer, params = done.world.optimizer, dict(done.model.named_parameters())
    folded = isinstance(optimizer.config, DGC) and optimizer.config.fold_lr
    scale = 1.0 if folded else float(optimizer.param_groups[0]["lr"])
    for name, left in done.world.residual().items():
        params[name].sub_(left, alpha=scale)
    return task.evaluate(done.model)


def provenance(device: str) -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware(device),
        "command": " ".join(["python -m benchmarks.convergence", *sys.argv[1:]]),
    }


def hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, 1 thread"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="lenet5")
    parser.add_argument("--arms", nargs="+", default=["dense", "dgc", "paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="of one worker")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", nargs="+", type=float, default=[0.05])
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--out", type=Path, help="JSON lines; a file of its own for cuda by default"
    )
    parser.add_argument("--table", action="store_true", help="print the results' table")
    parser.add_argument("--picture", type=Path, help="draw dense beside dgc, epoch by epoch")
    args = parser.parse_args()
    if args.out is None:
        args.out = RESULTS if args.device == "cpu" else RESULTS.with_name("convergence_cuda.jsonl")
    if args.table or args.picture:
        report(args)
        return
    torch.set_num_threads(1)
    for seed in args.seeds:
        for lr in args.lr:
            for arm in args.arms:
                once(args, arm, seed, lr)


def report(args: argparse.Namespace) -> None:
    """The table of all rows, or the picture."""
    rows = read(args.out)
    if args.table:
        print(table(rows))
    if args.picture:
        picture(rows, args.picture)


def once(args: argparse.Namespace, arm: str, seed: int, lr: float) -> None:
    """Run one arm unless its row is there."""
    options = parse_arm(arm, TASKS[args.task].steps(args.workers, args.batch))[1]
    wanted = {**vars(args), "arm": without_rate(arm), "seed": seed, "lr": options.get("lr", lr)}
    if any(all(row[k] == wanted[k] for k in KEY) for row in read(args.out)):
        return
    row = {**run(args, arm, seed, lr), **provenance(args.device)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{args.task} {arm} seed {seed}: {row['final']} in {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
