"""What does a training step cost over a slow link, against what PyTorch has in the box?

    sudo python -m benchmarks.bench_step [--rates 100mbit 1gbit none] [--nets resnet18 resnet50]

Emulated hosts (launch/emulate_hosts.py) and nets with the parameters of real ones and next to no
compute (benchmarks/step_job.py), so that a step is what the exchange costs. Every arm is a job of
its own; the dense one runs first and last, and ratios are to the mean of both. `limit` is the time
that the bytes that crossed the link of host 0, headers included, take at the link's rate. Cases
that the result file holds already and that are not run now stay in it, and in the picture.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from launch.emulate_hosts import EmulatedHosts, emulated_hosts

ARMS = {
    "DDP fp32": "ddp:fp32",
    "DDP fp16 hook": "ddp:fp16",
    "DDP PowerSGD rank 1": "ddp:powersgd1",
    "DDP PowerSGD rank 4": "ddp:powersgd4",
    "dgc hook, gloo": "ddp:dgc",
    "dgc, gloo": "gloo:{}",
    "dgc, MPI": "mpi:{}",
    "dgc auto, gloo": 'gloo:{"pattern": "auto"}',
    "dgc auto, MPI": 'mpi:{"pattern": "auto"}',
    "dgc dense, gloo": 'gloo:{"pattern": "dense"}',
    "dgc hierarchical, gloo": 'gloo:{"pattern": "hierarchical"}',
    "dgc shared-indices, gloo": 'gloo:{"pattern": "shared-indices"}',
    "dgc re-selecting, gloo": 'gloo:{"pattern": "re-selecting"}',
    "dense, MPI": "mpi:dense",
    "DDP fp32 again": "ddp:fp32",
}
RATES = {"100mbit": 1e8, "1gbit": 1e9, "none": None}
CASE = ("net", "hosts", "ranks_per_host", "rate")


def run(hosts: EmulatedHosts, ranks_per_host: int, arm: str, net: str, seconds: float) -> Any:
    """What the job says of itself, and, if it failed, why."""
    mode = "mpi" if arm.startswith("mpi") else "torchrun"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        job = [sys.executable, "-m", "benchmarks.step_job", arm, net, str(seconds), str(out)]
        done = hosts.run(job, mode, ranks_per_host=ranks_per_host, timeout=300)
        said = [line for line in done.stdout.splitlines() if line.startswith("dgc:")]
        if out.exists() and done.returncode == 0:
            return {**json.loads(out.read_text()), **({"said": said[0]} if said else {})}
        lines = done.stdout.strip().splitlines() or [""]
        return {"failed": f"exit {done.returncode}: {lines[-1][:200]}"}


def compare(
    hosts: int, ranks_per_host: int, rate: str, net: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each arm, the baseline first."""
    rows, commit = [], harness.setup()["commit"]
    with emulated_hosts(hosts, rate) as network:
        for name, arm in ARMS.items():
            if name in options.without or (hosts == 4 and "hierarchical" in name):
                continue
            row: dict[str, Any] = dict(zip(CASE, (net, hosts, ranks_per_host, rate), strict=True))
            row["commit"] = commit
            if options.density and "{" in arm:
                kind, _, config = arm.partition(":")
                arm = f"{kind}:{json.dumps({**json.loads(config), 'density': options.density})}"
            row |= {"arm": name, **run(network, ranks_per_host, arm, net, options.seconds)}
            if RATES[rate] and "link_bytes" in row:
                row["limit"] = 8 * row["link_bytes"] / RATES[rate]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    dense = [row["seconds"] for row in rows if row["arm"].startswith("DDP fp32")]
    for row in rows:
        if "seconds" in row:
            row["faster"] = sum(dense) / len(dense) / row["seconds"]
    return rows


def case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in CASE)


def printed(row: dict[str, Any]) -> dict[str, object]:
    if "failed" in row:
        return {"arm": row["arm"], "ms": row["failed"]}
    return {
        "arm": row["arm"],
        "ms": 1e3 * row["seconds"],
        "× DDP fp32": row["faster"],
        "MB received": row["link_bytes"] / 1e6,
        "limit ms": 1e3 * row["limit"] if "limit" in row else "",
        "hidden": row.get("overlap", ""),
        "pattern": row.get("pattern", ""),
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: how much faster than DDP fp32, for each rate; one column for each net and layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted({case(row)[:3] for row in rows})
    rates = [rate for rate in RATES if any(row["rate"] == rate for row in rows)]
    names = [name for name in ARMS if not name.endswith("again")]
    figure, axes = pyplot.subplots(
        1, len(cases), figsize=(5 * len(cases), 5), sharey=True, squeeze=False
    )
    for axis, place in zip(axes[0], cases, strict=True):
        for i, rate in enumerate(rates):
            found = {
                r["arm"]: r["faster"] for r in rows if case(r) == (*place, rate) and "faster" in r
            }
            heights = [j + (i - (len(rates) - 1) / 2) * 0.25 for j in range(len(names))]
            label = "unshaped" if rate == "none" else rate
            axis.barh(heights, [found.get(name, 0) for name in names], 0.25, label=label)
        axis.set_yticks(range(len(names)), names)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="times as fast as DDP fp32")
        axis.set_title("{}, {} hosts × {} ranks".format(*place), fontsize=10)
        axis.invert_yaxis()
    axes[0][0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--nets", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--layouts", nargs="+", default=["4x1", "2x2"], help="hosts x ranks")
    parser.add_argument("--without", nargs="+", default=[], choices=ARMS, help="arms to leave out")
    parser.add_argument("--seconds", type=float, default=4.0, help="about, of timed steps an arm")
    parser.add_argument("--density", type=float, help="of dgc's arms; its default if left out")
    parser.add_argument("--name", default="step_cpu2", help="of the files in benchmarks/results")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    earlier = harness.RESULTS / f"{options.name}.json"
    rows: list[dict[str, Any]] = json.loads(earlier.read_text())["rows"] if earlier.exists() else []
    for net in options.nets:
        for layout in options.layouts:
            hosts, ranks = map(int, layout.split("x"))
            for rate in options.rates:
                found = compare(hosts, ranks, rate, net, options)
                rows = [row for row in rows if case(row) != case(found[0])] + found
                print(f"\n{net}, {hosts} hosts of {ranks} ranks, {rate}\n", flush=True)
                print(harness.table([printed(row) for row in found]), flush=True)
                path = harness.save(options.name, {"rows": rows})
    picture(rows, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
