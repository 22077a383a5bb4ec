"""How many bytes does a rank receive in a step, by pattern and number of ranks?

    python -m benchmarks.volume [--ranks 4 8 16 32] [--simulated 4 8 16 32 64 128 256 512 1024]

ResNet-50's 161 tensors at full size, all in one bucket. Counted: the library as it is, ranks as
threads, gradients heavy-tailed and drawn anew on each rank, so that ranks hardly overlap: the worst
case for a second selection. Simulated: message sizes depend on counts alone, so the library's own
`Regions`, `message_plan` and `max_message_bytes` give them for places drawn at random, without
gradients. Needs 14 GB of memory for 32 ranks.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import torch

import dgc
from benchmarks import harness
from benchmarks.shapes import resnet50
from dgc.comm.exchange import Regions, _ring
from dgc.train import wire
from dgc.train.reselect import KEPT
from dgc.train.step import message_plan
from tests.threads import ThreadCommunicator, run_ranks

NUMELS = tuple(torch.Size(shape).numel() for shape in resnet50())
PATTERNS = ("all-gather", "shared-indices", "re-selecting")


def counted(world_size: int, pattern: str) -> float:
    """Most bytes that any rank receives in a step."""
    torch.set_num_threads(1)
    config = dgc.DGC(pattern=pattern, bucket_bytes=2**30)

    def body(comm: ThreadCommunicator) -> float:
        params = [torch.nn.Parameter(torch.zeros(numel)) for numel in NUMELS]
        named = [(f"p{i}", param) for i, param in enumerate(params)]
        optimizer = dgc.DistributedOptimizer(torch.optim.SGD(params, lr=0.1), named, config, comm)
        generator = torch.Generator().manual_seed(comm.rank)
        for param in params:
            param.grad = torch.randn(param.numel(), generator=generator).pow_(3)
        optimizer.synchronize()
        return float(optimizer.stats()["received_bytes"])

    return max(run_ranks(world_size, body))


def apart(world_size: int, pattern: str) -> float:
    """`counted` in a process of its own, which gives its gigabytes back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(counted, world_size, pattern).result()


def simulated(world_size: int) -> dict[str, float]:
    """The same by pattern, from the sizes of messages alone."""
    config, numel = dgc.DGC(), sum(NUMELS)
    counts, size = message_plan(NUMELS, config.density, config)
    values, tensors = sum(counts), len(NUMELS)
    regions = Regions(numel, world_size)
    room = (regions.region_numel,)

    @lru_cache(None)
    def bound(count: int) -> int:
        return wire.max_message_bytes(room, (count,), config.value_bits)

    drawn = torch.Generator().manual_seed(0)
    received = torch.zeros(world_size, dtype=torch.int64)
    for rank in range(world_size):
        owners, _ = regions.locate(torch.randint(numel, (values,), generator=drawn))
        found = torch.bincount(owners, minlength=world_size).tolist()
        row = torch.tensor([bound(count) for count in found])
        row[rank] = 0
        received += row
    capacity = min(room[0], -(-min(KEPT, world_size) * values // world_size))
    peers = world_size - 1
    agreement = _ring(world_size, 8 * (3 * tensors + 1))
    indices = wire.max_message_bytes(NUMELS, counts, 1)
    return {
        "all-gather": peers * size,
        "shared-indices": indices + _ring(world_size, 4 * (values + tensors + 1)),
        "re-selecting": int(received.max()) + agreement + peers * (4 + bound(capacity)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    powers = [2**i for i in range(2, 11)]
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32], help="to count at")
    parser.add_argument("--simulated", type=int, nargs="*", default=powers)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for ranks in sorted({*options.ranks, *options.simulated}):
        row: dict[str, object] = {"ranks": ranks, "dense": _ring(ranks, 4 * sum(NUMELS)) / 1e6}
        found = simulated(ranks)
        for pattern in PATTERNS:
            row[pattern] = found[pattern] / 1e6
            if ranks in options.ranks:
                row[f"{pattern}, counted"] = apart(ranks, pattern) / 1e6
        rows.append(row)
        print(row, flush=True)
    print(f"MB received by a rank\n{harness.table(rows)}")
    print(harness.save("volume_cpu2", {"unit": "MB", "numel": sum(NUMELS), "rows": rows}))


if __name__ == "__main__":
    main()
