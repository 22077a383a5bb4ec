"""How many bytes does a rank receive in a step, by pattern and number of ranks?

    python -m benchmarks.volume [--ranks 4 8 16 32]

The library's own code, ranks as threads; gradients of ResNet-50's shapes at 1/`--shrink` of their
size, heavy-tailed and drawn anew on each rank, so that ranks hardly overlap: the worst case for a
second selection. Reported as counted, not scaled up.
"""

import argparse

import torch

import dgc
from benchmarks import harness
from benchmarks.shapes import resnet50
from dgc.train.step import message_plan
from tests.threads import ThreadCommunicator, run_ranks

PATTERNS = ("all-gather", "re-selecting")


def received_bytes(world_size: int, pattern: str, numels: list[int], steps: int = 2) -> float:
    """Most bytes that any rank receives in a step."""
    config = dgc.DGC(pattern=pattern)

    def body(comm: ThreadCommunicator) -> float:
        params = [torch.nn.Parameter(torch.zeros(numel)) for numel in numels]
        named = [(f"p{i}", param) for i, param in enumerate(params)]
        optimizer = dgc.DistributedOptimizer(torch.optim.SGD(params, lr=0.1), named, config, comm)
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(steps):
            for param in params:
                param.grad = torch.randn(param.numel(), generator=generator) ** 3
            optimizer.step()
        return float(optimizer.stats()["received_bytes"]) / steps

    return max(run_ranks(world_size, body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--shrink", type=int, default=16)
    options = parser.parse_args()
    numels = [-(-torch.Size(shape).numel() // options.shrink) for shape in resnet50()]
    torch.set_num_threads(1)
    dense = 4 * sum(numels)
    rows: list[dict[str, object]] = []
    for ranks in options.ranks:
        row: dict[str, object] = {"ranks": ranks, "dense MB": 2 * dense * (ranks - 1) / ranks / 1e6}
        for pattern in PATTERNS:
            row[f"{pattern} MB"] = received_bytes(ranks, pattern, numels) / 1e6
        rows.append(row)
    counts, _ = message_plan(tuple(numels), dgc.DGC().density, dgc.DGC())
    print(f"{sum(numels)} elements, {sum(counts)} selected on each rank\n{harness.table(rows)}")
    found = {"numel": sum(numels), "selected": sum(counts), "shrink": options.shrink, "rows": rows}
    print(harness.save("volume_cpu2", found))


if __name__ == "__main__":
    main()
