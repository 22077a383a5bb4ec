"""`dgc bench`: what an exchange of a model's gradients costs on this job's own links.

Rows are the buckets that training would send, and their sum. Terms are those of nccl-tests: with S
the bytes of a rank's buffer (all-reduce) or of all messages (all-gather), algbw = S / time, and
busbw = algbw · 2(P−1)/P or algbw · (P−1)/P, which a perfect link reaches whatever P is.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from dgc.comm.base import Communicator
from dgc.config import DGC, Dense
from dgc.core.layout import Layout
from dgc.errors import ConfigError
from dgc.train.bucket import Bucket, CompressedBucket, DenseBucket
from dgc.train.measure import Cost, measure
from dgc.train.memory import Memory
from dgc.train.plan import plan

HEAD = (
    f"{'exchange':<22}{'elements':>12}{'bytes':>12}{'ratio':>8}{'code ms':>9}{'wait ms':>9}"
    f"{'total ms':>10}{'algbw GB/s':>12}{'busbw GB/s':>12}"
)


def sizes_of(model: str) -> dict[str, int]:
    """Elements of each parameter of `model`.

    Args:
        model: a safetensors file; "package.module:function" that returns an nn.Module; or a number
            of elements, as one parameter.

    Raises:
        ConfigError: none of these.

    Example:
        >>> sizes_of("1000")
        {'parameter': 1000}
    """
    if model.isdecimal() and int(model):
        return {"parameter": int(model)}
    if model.endswith(".safetensors"):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(model), "pt") as file:
                return {key: file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{model} is not a safetensors file: {error}") from error
    place, _, name = model.partition(":")
    try:
        built = getattr(import_module(place), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{model!r} gives no model ({error}): name a .safetensors file, MODULE:FUNCTION, or a "
            "number of elements"
        ) from error
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{model} returned a {type(built).__name__}: it must return an nn.Module")
    return {key: p.numel() for key, p in built.named_parameters()}


def buckets_of(sizes: dict[str, int], bucket_bytes: int) -> list[tuple[int, ...]]:
    """The elements of the tensors that travel together.

    Example:
        >>> buckets_of({"a": 10, "b": 2, "c": 3}, 16)
        [(3, 2), (10,)]
    """
    params = {n: nn.Parameter(torch.empty(size, device="meta")) for n, size in sizes.items()}
    names = plan(params, Dense(bucket_bytes=bucket_bytes))
    return [tuple(sizes[name] for name in bucket) for bucket in names]


def kinds(config: DGC, world_size: int) -> dict[str, Callable[[Layout], Bucket]]:
    """What is compared: a dense row, a 16-bit row, and the compressed one."""
    return {
        "dense fp32": lambda layout: DenseBucket(layout, torch.float32, world_size),
        "dense fp16": lambda layout: DenseBucket(layout, torch.float16, world_size),
        f"dgc {config.density:.3%} {config.value_bits} bit": lambda layout: CompressedBucket(
            Memory(layout, config), world_size
        ),
    }


def bench(
    model: str, config: DGC, comm: Communicator, device: torch.device, repeats: int = 5
) -> str:
    """The table, the same on all ranks.

    Args:
        model: see `sizes_of`.
        config: density, value bits and bucket size.
        comm: the job's ranks, two at least.
        device: where gradients lie.
        repeats: timed exchanges of each bucket.

    Raises:
        ConfigError: a world of one, no repeats, no such model, or one without parameters.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}: it must be at least 1")
    if comm.world_size < 2:
        raise ConfigError(
            "one rank exchanges nothing: start several, as in `torchrun --nproc-per-node 2 "
            "--no-python dgc bench MODEL`"
        )
    sizes = sizes_of(model)
    if not sum(sizes.values()):
        raise ConfigError(f"{model} has no parameters: there is nothing to exchange")
    buckets = buckets_of(sizes, config.bucket_bytes)
    lines = [HEAD]
    totals: dict[str, Cost] = {}
    for numels in dict.fromkeys(buckets):  # buckets of the same make are timed once
        for kind, make in kinds(config, comm.world_size).items():
            cost = measure(make(Layout.of(numels, device)), comm, device, repeats)
            lines.append(_line(kind, cost, comm.world_size))
            for _ in range(buckets.count(numels)):
                totals[kind] = totals[kind].plus(cost) if kind in totals else cost
    lines += [f"all {len(buckets)} buckets, one after another:"]
    lines += [_line(kind, cost, comm.world_size) for kind, cost in totals.items()]
    return "\n".join([*lines, verdict(list(totals.values()), comm.world_size)])


def _line(kind: str, cost: Cost, world_size: int) -> str:
    gathered = kind.startswith("dgc")
    size = cost.payload_bytes * (world_size if gathered else 1)
    algbw = size / cost.wait_seconds / 1e9
    busbw = algbw * (world_size - 1) / world_size * (1 if gathered else 2)
    ratio = 4 * cost.elements / cost.payload_bytes
    milliseconds = [1e3 * t for t in (cost.code_seconds, cost.wait_seconds, cost.seconds)]
    code, wait, total = milliseconds
    return (
        f"{kind:<22}{cost.elements:>12}{cost.payload_bytes:>12}{ratio:>8.1f}{code:>9.2f}{wait:>9.2f}"
        f"{total:>10.2f}{algbw:>12.3f}{busbw:>12.3f}"
    )


def break_even_bytes(dense: Cost, compressed: Cost, world_size: int) -> float:
    """The link speed, bytes a second, below which compression wins by the ring's formulas.

        dense:      t = c₁ + 2(P−1)/P · S₁ / B          compressed:  t = c₂ + (P−1) · S₂ / B

    Returns:
        B where both are equal; inf where coding costs no more time than the dense row's copies, 0
        where compression sends more.

    Example:
        >>> dense, compressed = Cost(10, 40, 0.0, 0.0), Cost(10, 4, 2.0, 0.0)
        >>> break_even_bytes(dense, compressed, 2)
        18.0
    """
    ring = 2 * (world_size - 1) / world_size * dense.payload_bytes
    saved_bytes = ring - (world_size - 1) * compressed.payload_bytes
    lost_seconds = compressed.code_seconds - dense.code_seconds
    if saved_bytes <= 0:
        return 0.0
    return saved_bytes / lost_seconds if lost_seconds > 0 else float("inf")


def _links(limit: float) -> str:
    if limit == 0:
        return "no link: it sends more"
    if limit == float("inf"):
        return "any link: coding took no longer than copying"
    return f"links below {8e-9 * limit:.2f} Gbit/s (break-even)"


def verdict(costs: Sequence[Cost], world_size: int) -> str:
    """What the last row means."""
    dense, half, compressed = costs
    lines = [f"{world_size} ranks; totals leave out what training overlaps with the backward pass."]
    for name, other in (("dense fp32", dense), ("dense fp16", half)):
        faster = other.seconds / compressed.seconds
        lines.append(
            f"compressed is {faster:.2f} times as fast as {name} here; it pays on "
            + _links(break_even_bytes(other, compressed, world_size))
        )
    return "\n".join(lines)
