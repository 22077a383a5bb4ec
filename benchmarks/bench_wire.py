"""Bytes and time of gradient messages, beside the limits of both.

    python -m benchmarks.bench_wire --save wire_cpu2

Bits: whole messages, with header, levels and checksum, for each selected value; "limit" is the
entropy of the positions, H(density)/density, plus the width of a value. "padded" is the size known
before encoding, what an exchange of fixed size sends. Times are medians over rounds that call
every function in turn; the unit is torch's momentum update `u.mul_(m).add_(g); v.add_(u)`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import interpret_triton, medians_ms, save, table
from benchmarks.shapes import resnet50
from dgc.core import Sparse, SparseBatch, num_selected, select_topk
from dgc.core.kernels.codec_reference import dequantize, quantize
from dgc.core.quantize import VALUE_BITS
from dgc.train import wire
from dgc.train.assemble import encode_rice
from dgc.train.frame import max_frame_bytes, read_frame

NUMEL = 25_557_032
BUCKET_BYTES = 25 << 20
VALUES = 4
"""Bits of a value, where nothing else is said."""

Rows = list[dict[str, object]]


def limit(density: float, value_bits: int) -> float:
    """Bits a value that no code of uniformly spread positions can go below."""
    rest = (1 - density) * math.log2(1 - density) if density < 1 else 0.0
    return -(math.log2(density) + rest / density) + value_bits


def batch_of(gradient: Tensor, numels: Sequence[int], density: float) -> SparseBatch:
    parts = gradient.split(list(numels))
    return SparseBatch.cat([select_topk(p, num_selected(p.numel(), density)) for p in parts])


def rice_bytes(batch: SparseBatch, value_bits: int) -> tuple[int, int]:
    """The message as a GPU makes it: its own bytes, and those with padding."""
    interpret_triton()
    padded = max_frame_bytes(batch.numels, batch.counts, value_bits, rice=True)
    message, _ = encode_rice(batch, value_bits, message_bytes=padded)
    header, _ = read_frame(message.numpy(), batch.numels)
    assert header.num_values == sum(batch.counts), "a value had no room"
    return header.message_bytes, padded


def size_row(batch: SparseBatch, density: float, value_bits: int) -> dict[str, object]:
    count = sum(batch.counts)
    exact = wire.encode(batch.split(), value_bits).numel()
    padded = wire.max_message_bytes(batch.numels, batch.counts, value_bits)
    rice, rice_padded = rice_bytes(batch, value_bits)
    return {
        "density": density,
        "value bits": value_bits,
        "values": count,
        "limit": round(limit(density, value_bits), 3),
        "exact": round(8 * exact / count, 3),
        "padded": round(8 * padded / count, 3),
        "dense fp32 / padded": round(sum(batch.numels) * 4 / padded),
        "on a GPU": round(8 * rice / count, 3),
        "padded, on a GPU": round(8 * rice_padded / count, 3),
    }


def sizes(gradient: Tensor) -> Rows:
    found = []
    for density in (0.0001, 0.001, 0.01, 0.25):
        batch = batch_of(gradient, [NUMEL], density)
        widths = VALUE_BITS if density == 0.001 else (VALUES,)
        found += [size_row(batch, density, bits) for bits in widths]
    return found


def buckets(numels: Sequence[int]) -> list[list[int]]:
    """The tensors in reverse order, cut where a bucket has reached 25 MiB, as DDP does."""
    out: list[list[int]] = [[]]
    for numel in reversed(numels):
        if 4 * sum(out[-1]) >= BUCKET_BYTES:
            out.append([])
        out[-1].append(numel)
    return out


def resnet_rows(gradient: Tensor, numels: Sequence[int]) -> Rows:
    """Total of a step in one bucket and in buckets of 25 MiB."""
    rows: Rows = []
    for name, groups in (("1 bucket", [list(numels)]), ("25 MiB buckets", buckets(numels))):
        exact = padded = rice_padded = count = 0
        for part, group in zip(gradient.split([sum(g) for g in groups]), groups, strict=True):
            batch = batch_of(part, group, 0.001)
            count += sum(batch.counts)
            exact += wire.encode(batch.split(), VALUES).numel()
            padded += wire.max_message_bytes(batch.numels, batch.counts, VALUES)
            rice_padded += rice_bytes(batch, VALUES)[1]
        rows.append(
            {
                "messages": f"{name}: {len(groups)}",
                "values": count,
                "exact bytes": exact,
                "padded bytes": padded,
                "bits a value, padded": round(8 * padded / count, 3),
                "dense fp32 / exact": round(4 * NUMEL / exact),
                "dense fp32 / padded": round(4 * NUMEL / padded),
                "padded bytes, on a GPU": rice_padded,
                "dense fp32 / padded, on a GPU": round(4 * NUMEL / rice_padded),
            }
        )
    return rows


def spreads() -> Rows:
    """The same number of indices spread in different ways."""
    count = num_selected(NUMEL, 0.001)
    rng = np.random.default_rng(0)
    base = np.arange(count)
    rows_of_512 = np.sort(rng.choice(NUMEL // 512, -(-count // 512), replace=False))
    kinds = {
        "uniform": np.sort(rng.choice(NUMEL, count, replace=False)),
        "whole rows of 512": (rows_of_512[:, None] * 512 + np.arange(512)).reshape(-1)[:count],
        "all at the start": base,
        "all at the end": base + NUMEL - count,
        "evenly spaced": base * (NUMEL // count),
        "half at the start": np.concatenate(
            [
                base[: count // 2],
                np.sort(rng.choice(NUMEL // 2, count - count // 2, replace=False)) + NUMEL // 2,
            ]
        ),
    }
    values = torch.from_numpy(rng.laplace(size=count).astype(np.float32))
    bound = wire.max_message_bytes([NUMEL], [count], VALUES)
    return [
        {
            "spread": name,
            "exact": round(
                8
                * wire.encode([Sparse(torch.from_numpy(i), values, NUMEL)], VALUES).numel()
                / count,
                3,
            ),
            "padded": round(8 * bound / count, 3),
        }
        for name, i in kinds.items()
    ]


def errors() -> Rows:
    """Σ (v − q)² / Σ v² on the largest 0.1 % of a million; Lloyd-Max may end in a local optimum."""
    rng = np.random.default_rng(0)
    draws: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: rng.normal(size=1_000_000),
        "Laplace": lambda: rng.laplace(size=1_000_000),
        "Student t, 3": lambda: rng.standard_t(3, size=1_000_000),
        "log-normal, 2": lambda: np.exp(2 * rng.normal(size=1_000_000)),
    }
    rows: Rows = []
    for name, draw in draws.items():
        tail = np.sort(np.abs(draw()))[-1000:].astype(np.float32)
        for bits in (1, 2, 3, 4, 8, 16):
            parameters, codes = quantize(tail, np.array([len(tail)]), bits)
            found = dequantize(codes, parameters, np.array([len(tail)]), bits)
            uniform = tail.max() * np.arange(1, (1 << bits - 1) + 1) / (1 << bits - 1)
            rows.append(
                {
                    "values": name,
                    "bits": bits,
                    "this": relative_error(tail, found),
                    "uniform to the maximum": nearest_error(tail, uniform),
                    "Lloyd-Max": nearest_error(tail, lloyd(tail, bits)) if bits <= 4 else "",
                }
            )
    return rows


def relative_error(values: np.ndarray, found: np.ndarray) -> float:
    wide = values.astype(np.float64)
    return float(((wide - found) ** 2).sum() / (wide**2).sum())


def nearest_error(values: np.ndarray, levels: np.ndarray) -> float:
    return relative_error(values, levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)])


def lloyd(values: np.ndarray, bits: int) -> np.ndarray:
    """Levels and cells in turn until they are each other's best answer (Lloyd, 1957)."""
    count = 1 << bits - 1
    levels = np.quantile(values, (np.arange(count) + 0.5) / count).astype(np.float64)
    for _ in range(500):
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
        number = np.bincount(cell, minlength=count)
        levels = np.where(number, np.bincount(cell, values, count) / np.maximum(number, 1), levels)
    return levels


def times(gradient: Tensor, numels: Sequence[int], rounds: int) -> Rows:
    u, v = torch.zeros(NUMEL), torch.zeros(NUMEL)
    functions: dict[str, Callable[[], object]] = {
        "momentum update": lambda: v.add_(u.mul_(0.9).add_(gradient)),
        "zero fill alone": v.zero_,
    }
    for name, split in (("1 tensor", [NUMEL]), (f"{len(numels)} tensors", list(numels))):
        batch = batch_of(gradient, split, 0.001)
        size = wire.max_message_bytes(batch.numels, batch.counts, VALUES)
        message = wire.encode_batch(batch, VALUES, message_bytes=size)[0]
        dense = [torch.empty(numel) for numel in split]
        functions[f"encode, {name}"] = lambda batch=batch, size=size: wire.encode_batch(
            batch, VALUES, message_bytes=size
        )
        functions[f"decode to indices, {name}"] = lambda message=message: wire.decode_batch(message)
        functions[f"4 messages to a dense mean, {name}"] = lambda message=message, dense=dense: (
            wire.set_mean_([message] * 4, dense, 0.25)
        )
    found = medians_ms(functions, rounds)
    unit = found["momentum update"]
    return [
        {"what": name, "ms": round(ms, 3), "of the momentum update": round(ms / unit, 4)}
        for name, ms in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--save", help="name of a file under benchmarks/results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    gradient = torch.distributions.Laplace(0.0, 1.0).sample((NUMEL,))
    numels = [prod(shape) for shape in resnet50()]
    results = {
        "bits a value, one tensor, Laplace": sizes(gradient),
        "ResNet-50, 161 tensors, density 0.001, 4 bits": resnet_rows(gradient, numels),
        "bits a value by spread of the indices, density 0.001, 4 bits": spreads(),
        "relative squared error of the quantiser": errors(),
        f"time, {NUMEL} elements, density 0.001, 4 bits": times(gradient, numels, arguments.rounds),
    }
    for title, rows in results.items():
        print(f"\n{title}\n\n{table(rows)}")
    if arguments.save:
        print(save(arguments.save, results))


if __name__ == "__main__":
    main()
