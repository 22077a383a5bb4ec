"""Past this machine: what an exchange would take on many ranks and faster links.

    python -m benchmarks.scale [--latency-us 20]

The cost model that `DGC(pattern="auto")` chooses by (dgc.train.choice), with links by formula and
the coding as timed on this machine, all of its cores for one rank. Nothing is overlapped and the
model's own compute is left out, so these are times of the exchange alone: dense ones can hide
behind the backward pass. A simulation: none of these ranks were run.
"""

import argparse
from math import prod
from pathlib import Path

import torch

import dgc
from benchmarks import harness, shapes
from dgc.bench import buckets_of
from dgc.comm.cost import Link, Links
from dgc.train.choice import Coding, Costs, Echo, coding_of, predict

MODELS = {
    "ResNet-50": shapes.resnet50,
    "VGG-16": shapes.vgg16,
    "BERT-Large": shapes.bert_large,
    "LLaMA-7B": shapes.llama_7b,
}
GBITS = (1, 10, 25, 100)
RANKS = [4 * 2**i for i in range(11)]
FREE = Coding(0.0, 0.0, 0.0, 0.0, 0.0)
PATTERNS = ("all-gather", "shared-indices", "re-selecting")
COLOURS = dict(
    zip(("dense", *PATTERNS), ("black", "tab:orange", "tab:green", "tab:red"), strict=True)
)
Sizes = list[tuple[int, ...]]


def sizes_of(model: str, bucket_bytes: int) -> Sizes:
    numels = {f"p{i}": prod(shape) for i, shape in enumerate(MODELS[model]())}
    return buckets_of(numels, bucket_bytes)


def seconds(
    sizes: Sizes, ranks: int, gbits: float, latency: float, coding: Coding
) -> dict[str, float]:
    link = Link(latency, 8e-9 / gbits)
    costs = Costs(ranks, ranks, Links(link, link), None, None, coding)
    return predict(costs, sizes, dgc.DGC().density, dgc.DGC())


def break_even(sizes: Sizes, ranks: int, latency: float, coding: Coding, pattern: str) -> float:
    """The rate in Gbit/s at which dense is as fast as `pattern`: slower links want compression."""
    low, high = 1e-3, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        found = seconds(sizes, ranks, middle, latency, coding)
        low, high = (middle, high) if found[pattern] < found["dense"] else (low, middle)
    return low


def picture(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(MODELS), len(GBITS) + 1, figsize=(19, 13), sharex=True, squeeze=False
    )
    for line, model in zip(axes, MODELS, strict=True):
        for axis, gbits in zip(line, GBITS, strict=False):
            found = [r for r in rows if (r["model"], r["Gbit/s"]) == (model, gbits)]
            for name in ("dense", *PATTERNS):
                axis.plot(RANKS, [r[name] for r in found], label=name, color=COLOURS[name])
                if name != "dense":
                    free = [r[f"{name}, free coding"] for r in found]
                    axis.plot(RANKS, free, ":", color=COLOURS[name])
            axis.set(xscale="log", yscale="log", title=f"{model}, {gbits} Gbit/s: seconds")
        for name in PATTERNS:
            found = [r for r in rows if (r["model"], r["Gbit/s"]) == (model, GBITS[0])]
            limits = [r[f"{name}, break-even"] for r in found]
            line[-1].plot(RANKS, limits, label=name, color=COLOURS[name])
        line[-1].set(xscale="log", yscale="log", ylim=(0.1, None))
        line[-1].set_title(f"{model}: break-even, Gbit/s")
    for axis in axes[-1]:
        axis.set_xlabel("ranks")
    axes[0][0].legend(fontsize=8)
    axes[0][-1].legend(fontsize=8)
    figure.suptitle("Dotted: coding at no cost. Compression pays below a break-even line.")
    figure.tight_layout()
    figure.savefig(path, dpi=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency-us", type=float, default=20.0, help="of a message")
    parser.add_argument("--bucket-bytes", type=int, default=dgc.DGC.bucket_bytes)
    options = parser.parse_args()
    latency = options.latency_us * 1e-6
    config = dgc.DGC()
    coding = coding_of(
        Echo(4), sizes_of("ResNet-50", config.bucket_bytes), config, torch.device("cpu")
    )
    rows: list[dict[str, object]] = []
    for model in MODELS:
        sizes = sizes_of(model, options.bucket_bytes)
        for ranks in RANKS:
            limits = {p: break_even(sizes, ranks, latency, coding, p) for p in PATTERNS}
            for gbits in GBITS:
                row: dict[str, object] = {"model": model, "Gbit/s": gbits, "ranks": ranks}
                row |= seconds(sizes, ranks, gbits, latency, coding)
                free = seconds(sizes, ranks, gbits, latency, FREE)
                row |= {f"{p}, free coding": free[p] for p in PATTERNS}
                rows.append(row | {f"{p}, break-even": limits[p] for p in PATTERNS})
    shown = [
        {"model": r["model"], "ranks": r["ranks"], "dense s": r["dense"]}
        | {f"{p} s": r[p] for p in PATTERNS}
        | {f"{p} pays below, Gbit/s": r[f"{p}, break-even"] for p in PATTERNS}
        for r in rows
        if r["Gbit/s"] == 10 and r["ranks"] in (4, 64, 1024)
    ]
    print(harness.table(shown))
    setting = {"latency_us": options.latency_us, "coding": coding._asdict()}
    path = harness.save("scale_cpu2", {**setting, "rows": rows})
    picture(rows, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
