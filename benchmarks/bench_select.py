"""What does finding the k largest of 25,557,032 cost, and is it the right k?

    python -m benchmarks.bench_select [--rounds 9] [--steps 200] [--quality-numel 25557032]

Times: one tensor of Laplace-distributed values, density 0.001, all rows called in turn, medians.
Quality: `benchmarks.quality`. The dense row is the pass that training makes anyway.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import medians_ms, save, setup, table
from benchmarks.quality import run
from dgc.core.kernels import reference
from dgc.core.layout import Layout
from dgc.core.select import ChunkedTopK, ExactTopK, Selector, ThresholdTopK, num_selected

NUMEL = 25_557_032
DENSITY = 0.001
SELECTORS: dict[str, Selector] = {
    "threshold": ThresholdTopK(),
    "exact": ExactTopK(),
    "chunks of 4096": ChunkedTopK(),
}
LIMITS = {
    "recall, mean": ("≥", 0.99),
    "recall, worst": ("≥", 0.95),
    "most selected / k": ("≤", 1.0),
    "tenth, least": ("≥", 0.97),
    "tenth, most": ("≤", 1.03),
}


def laplace(numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (numel,), generator=generator).mul_(2).sub_(1)
    return torch.empty(numel).exponential_(generator=generator).mul_(sign)


def threshold_and_nonzero(v: Tensor, threshold: float) -> Tensor:
    """The usual way in torch: a threshold that happens to be right, one pass each for its parts."""
    return v[(v.abs() >= threshold).nonzero().flatten()]


def contenders(v: Tensor) -> dict[str, Callable[[], object]]:
    layout, k = Layout.of([NUMEL]), num_selected(NUMEL, DENSITY)
    kth = torch.topk(v.abs(), k).values[-1].item()
    half = v.half()
    found: dict[str, Callable[[], object]] = {
        "bare update: u.mul_(m).add_(g); w.add_(u)": bare_update(v),
        "16-bit: cast to fp16": lambda: half.copy_(v),
        "torch.topk(|v|, k)": lambda: torch.topk(v.abs(), k, sorted=False),
        "torch |v| >= known threshold, nonzero": lambda: threshold_and_nonzero(v, kth),
        "reference kernel": lambda: reference.select_(v, layout, [k], None),
    }
    for name, selector in SELECTORS.items():
        found[f"dgc {name}"] = bound(selector, v, layout, k)
    return found


def bare_update(g: Tensor) -> Callable[[], object]:
    u, w = torch.zeros_like(g), torch.zeros_like(g)
    return lambda: w.add_(u.mul_(0.9).add_(g))


def bound(selector: Selector, v: Tensor, layout: Layout, k: int) -> Callable[[], object]:
    state = selector.state(layout)
    return lambda: selector.select_(v, layout, [k], state)


def timed(rounds: int) -> list[dict[str, object]]:
    times = medians_ms(contenders(laplace(NUMEL)), rounds)
    base = next(iter(times.values()))
    return [
        {"what": name, "ms": round(ms, 2), "× bare update": round(ms / base, 3)}
        for name, ms in times.items()
    ]


def judged(numel: int, steps: int) -> list[dict[str, object]]:
    found = []
    for name, selector in SELECTORS.items():
        if name == "exact":  # bit for bit what the threshold selects, as the tests hold
            continue
        for measure, value in run(selector, numel, steps).row().items():
            sign, limit = LIMITS[measure]
            row = {"selector": name, "measure": measure, "value": value}
            # Chunks are chosen for their fixed size; only top-k selectors are held to its limits.
            found.append(row | {"limit": "" if name.startswith("chunks") else f"{sign} {limit}"})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200, help="0 leaves the quality out")
    parser.add_argument("--quality-numel", type=int, default=NUMEL)
    parser.add_argument("--save", default="select_cpu2")
    arguments = parser.parse_args()
    print(setup())
    times = timed(arguments.rounds)
    print(table(times))
    quality = judged(arguments.quality_numel, arguments.steps) if arguments.steps else []
    if quality:
        print(table(quality))
    judged_on = {"steps": arguments.steps, "quality_numel": arguments.quality_numel}
    print(save(arguments.save, {"times": times, "quality": quality, **judged_on}))


if __name__ == "__main__":
    main()
