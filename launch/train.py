"""The reference job: train one network on Fashion-MNIST with every rank of an mpirun or torchrun.

    mpirun -np 4 python -m launch.train --compression dgc --epochs 5 --out out/dgc

Writes to the folder --out: log.jsonl (one line an epoch, then the result) and model.safetensors.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import dgc
from dgc.config import PATTERNS, Compression
from dgc.errors import ConfigError
from launch import fashion_mnist, models
from launch.compress import accuracy

DTYPES = {"dense": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The learning rate of each, the best of 0.025, 0.05, ... for LeNet-5 (see docs/log.md).
LEARNING_RATES = {"dgc": 0.1, "paper": 0.1, "dense": 0.05, "fp16": 0.05, "bf16": 0.05}
# What loses nothing in some thousand steps, and the paper's own, unless an option says otherwise.
DEFAULTS = {
    "dgc": {"density": 0.0035, "value_bits": 1, "warmup_epochs": 0.1},
    "paper": {"density": 0.001, "value_bits": 32, "warmup_epochs": 0.5},
}


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of IDX files; found or fetched where left out")
    parser.add_argument("--model", choices=models.MODELS, default="lenet5")
    parser.add_argument("--compression", choices=LEARNING_RATES, default="dgc")
    parser.add_argument("--density", type=float, help="share that is sent: 0.0035; paper 0.001")
    parser.add_argument("--value-bits", type=int, help="of each value sent: 1; paper 32")
    parser.add_argument("--warmup-epochs", type=float, help="of the density: 0.1; paper 0.5")
    parser.add_argument("--pattern", choices=PATTERNS, default=dgc.DGC.pattern, help="of exchange")
    parser.add_argument("--clip-norm", type=float, default=None, help="local gradient clipping")
    parser.add_argument("--epochs", type=positive, default=5)
    parser.add_argument("--batch", type=positive, default=64, help="images a rank")
    parser.add_argument("--lr", type=float, help="0.1 with dgc and paper, else 0.05")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="see dgc.init")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.compression in DTYPES:
        own = ("density", "value_bits", "warmup_epochs", "clip_norm", "pattern")
        if given := [name for name in own if getattr(args, name) != parser.get_default(name)]:
            parser.error(f"--compression {args.compression} takes no {', '.join(given)}")
    args.lr = LEARNING_RATES[args.compression] if args.lr is None else args.lr
    return args


def compression(args: argparse.Namespace, steps_per_epoch: int) -> Compression:
    if args.compression in DTYPES:
        return dgc.Dense(dtype=DTYPES[args.compression])
    defaults = DEFAULTS[args.compression]
    given = {key: getattr(args, key) for key in defaults if getattr(args, key) is not None}
    chosen: dict[str, Any] = {**defaults, **given}
    chosen["warmup_steps"] = round(chosen.pop("warmup_epochs") * steps_per_epoch)
    make = dgc.DGC.paper if args.compression == "paper" else dgc.DGC
    return make(clip_norm=args.clip_norm, pattern=args.pattern, **chosen)


def batches(rt: dgc.Runtime, args: argparse.Namespace, count: int, epoch: int) -> Tensor:
    """The images of this rank in this epoch, int64 `[steps, batch]`: every rank its own share."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
    steps = count // (args.batch * rt.world_size)
    share = order[: steps * args.batch * rt.world_size].view(steps, rt.world_size, args.batch)
    return share[:, rt.rank]


def train(rt: dgc.Runtime, args: argparse.Namespace) -> None:
    if rt.local_rank == 0:
        fashion_mnist.find(args.data)  # one rank of each host fetches, the others find
    rt.comm.barrier()
    data = fashion_mnist.Data(*(t.to(rt.device) for t in fashion_mnist.load(args.data)))
    model = models.build(args.model, args.seed).to(rt.device)
    steps_per_epoch = len(batches(rt, args, len(data.train_labels), 0))
    if not steps_per_epoch:
        raise ConfigError(
            f"{len(data.train_labels)} images are too few for one step of {rt.world_size} ranks "
            f"with {args.batch} each: lower --batch"
        )
    sgd = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    optimizer = dgc.DistributedOptimizer(
        sgd,
        named_parameters=model.named_parameters(),
        compression=compression(args, steps_per_epoch),
        named_buffers=model.named_buffers(),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps_per_epoch)
    log = Log(rt, args, args.epochs * steps_per_epoch)
    for epoch in range(args.epochs):
        for images in batches(rt, args, len(data.train_labels), epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_images[images]), data.train_labels[images])
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        if rt.rank == 0:
            percent = accuracy(model, data.test_images, data.test_labels)
            model.train()
            log.epoch(epoch + 1, percent, optimizer)
        rt.comm.barrier()
    if rt.rank == 0:
        save_file(model.state_dict(), args.out / "model.safetensors")
        log.close()


class Log:
    """Rank 0's progress bar and JSON lines; the other ranks' calls do nothing."""

    def __init__(self, rt: dgc.Runtime, args: argparse.Namespace, steps: int) -> None:
        self.args, self.world_size, self.lines, self.bar = args, rt.world_size, [], None
        self.training_seconds, self.since = 0.0, time.perf_counter()
        if rt.rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            if not args.quiet:
                from tqdm import tqdm

                self.bar = tqdm(total=steps, desc=args.compression, unit="step", mininterval=1)

    def step(self, loss: Tensor) -> None:
        if self.bar is not None:
            self.bar.update()
            if self.bar.n % 50 == 0:
                self.bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)

    def epoch(self, epoch: int, percent: float, optimizer: dgc.DistributedOptimizer) -> None:
        stats = optimizer.stats()
        self.training_seconds += time.perf_counter() - self.since
        line = {
            "compression": self.args.compression,
            "model": self.args.model,
            "seed": self.args.seed,
            "lr": self.args.lr,
            "ranks": self.world_size,
            "epoch": epoch,
            "accuracy": percent,
            "seconds_per_step": self.training_seconds / max(1, int(stats["steps"])),
            **stats,
        }
        self.lines.append(json.dumps(line))
        partial = self.args.out / "log.jsonl.part"
        partial.write_text("\n".join(self.lines) + "\n")
        partial.replace(self.args.out / "log.jsonl")
        self.since = time.perf_counter()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    torch.set_num_threads(1)  # ranks share the cores
    options = arguments()
    with dgc.init(options.backend) as runtime:
        train(runtime, options)
