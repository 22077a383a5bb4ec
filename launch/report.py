"""Compare runs of the reference job: a table, JSON lines, and a picture of accuracy against bytes.

    python -m launch.report out/dense out/dgc --out out

Each folder holds the log.jsonl that `launch.train` wrote. Writes report.jsonl and report.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_COLUMNS = (
    ("run", 8),
    ("lr", 5),
    ("accuracy %", 10),
    ("dense bytes", 13),
    ("sent bytes", 13),
    ("ratio", 8),
    ("compress s", 10),
    ("exchange s", 10),
    ("ms/step", 8),
)


def read(folder: Path) -> list[Line]:
    """The epochs of a run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def table(runs: dict[str, list[Line]]) -> str:
    """One row a run: its last epoch."""
    rows = ["  ".join(name.rjust(width) for name, width in _COLUMNS)]
    for name, lines in runs.items():
        last = lines[-1]
        cells = (
            name,
            f"{last['lr']:g}",
            f"{last['accuracy']:.2f}",
            f"{last['dense_bytes']:,}",
            f"{last['sent_bytes']:,}",
            f"{last['compression_ratio']:.1f}",
            f"{last['compress_seconds']:.1f}",
            f"{last['exchange_seconds']:.1f}",
            f"{1000 * last['seconds_per_step']:.1f}",
        )
        rows.append(
            "  ".join(c.rjust(width) for c, (_, width) in zip(cells, _COLUMNS, strict=True))
        )
    last = next(iter(runs.values()))[-1]
    rows.append(
        f"\n{last['ranks']} ranks, {last['model']}, {last['epoch']} epochs, bytes sent by each rank"
    )
    return "\n".join(rows)


def after_warmup(lines: list[Line]) -> float | None:
    """The compression ratio of the last epoch alone."""
    if len(lines) < 2:
        return None
    dense, sent = (lines[-1][key] - lines[-2][key] for key in ("dense_bytes", "sent_bytes"))
    return float(dense / sent) if sent else None


def picture(runs: dict[str, list[Line]], path: Path) -> None:
    """Accuracy after each epoch against the bytes sent until then."""
    from dgc.errors import MissingPackageError

    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError(
            "the picture needs matplotlib: pip install 'dgc[plots]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, lines in runs.items():
        sent = [line["sent_bytes"] / 1e6 for line in lines]
        axes.plot(sent, [line["accuracy"] for line in lines], marker="o", label=name)
        axes.annotate(
            f"{lines[-1]['accuracy']:.2f} %, {sent[-1]:,.1f} MB",
            (sent[-1], lines[-1]["accuracy"]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
        )
    axes.set(xscale="log", xlabel="megabytes sent by each rank", ylabel="test accuracy, %")
    axes.set_title(f"{lines[-1]['model']}, {lines[-1]['ranks']} ranks, one point an epoch")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders that launch.train wrote")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    names = [folder.name for folder in args.runs]
    runs = {
        str(folder) if names.count(folder.name) > 1 else folder.name: read(folder)
        for folder in args.runs
    }
    print(table(runs))
    for name, lines in runs.items():
        ratio = after_warmup(lines)
        if ratio is not None and ratio > 2.5:
            print(f"{name}: {ratio:.0f} times fewer bytes than dense in the last epoch")
    args.out.mkdir(parents=True, exist_ok=True)
    finals = [json.dumps({"run": name, **lines[-1]}) for name, lines in runs.items()]
    (args.out / "report.jsonl").write_text("\n".join(finals) + "\n")
    picture(runs, args.out / "report.png")
    print(f"written: {args.out / 'report.jsonl'}, {args.out / 'report.png'}")


if __name__ == "__main__":
    main()
