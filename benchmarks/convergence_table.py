"""The table and the picture of convergence.py's results."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results" / "convergence_cpu2.jsonl"
SETTING = ("task", "workers", "batch", "epochs", "schedule")
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
STUDENT += (2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All rows of a file of JSON lines, arms without their rate; none if it is not there."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{**row, "arm": without_rate(row["arm"])} for row in rows]


def without_rate(arm: str) -> str:
    """`arm` without its learning rate, which a row has beside it.

    Example: "dgc,lr=0.1,value_bits=1" and "dgc,value_bits=1" at 0.1 are one arm.
    """
    return ",".join(part for part in arm.split(",") if not part.startswith("lr="))


def table(rows: Sequence[Row]) -> str:
    """One Markdown table for each setting, arms against dense with the same seeds."""
    settings: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        settings[tuple(row[key] for key in SETTING)].append(row)
    parts = []
    for setting, own in settings.items():
        parts.append("\n**" + ", ".join(f"{k} {v}" for k, v in zip(SETTING, setting, strict=True)))
        parts[-1] += f"** ({own[0]['metric']})\n"
        parts += [
            "| arm | lr | seeds | result | minus dense (95 % interval) | flushed minus dense | dense bytes / sent bytes |",
            "|---|---|---|---|---|---|---|",
            *_lines(own),
        ]
    return "\n".join(parts)


def _lines(rows: Sequence[Row]) -> list[str]:
    arms: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        arms[row["arm"], row["lr"]].append(row)
    dense = _reference(arms)
    return [_line(arm, lr, own, dense) for (arm, lr), own in sorted(arms.items())]


def _reference(arms: dict[tuple[str, float], list[Row]]) -> dict[int, float]:
    """The results of the dense arm by seed, at its best learning rate of those with most seeds."""
    sign = {"accuracy": 1, "perplexity": -1}
    best: dict[int, float] = {}
    score = (0, float("-inf"))
    for (arm, _), own in arms.items():
        finals = {row["seed"]: row["final"] for row in own if row["final"] is not None}
        if arm.split(",")[0] == "dense" and finals:
            new = (len(finals), sign[own[0]["metric"]] * mean(finals.values()))
            if new > score:
                best, score = finals, new
    return best


def _line(arm: str, lr: float, rows: Sequence[Row], dense: dict[int, float]) -> str:
    finals = [row["final"] for row in rows if row["final"] is not None]
    lost = len(rows) - len(finals)
    seeds = f"{len(rows)}" + (f", {lost} diverged" if lost else "")
    result = interval(finals, 2, "±") if finals else "—"
    ratio = mean(row["stats"]["compression_ratio"] for row in rows)
    cells = [_minus(rows, dense, key) for key in ("final", "flushed")]
    return f"| `{arm}` | {lr:g} | {seeds} | {result} | {cells[0]} | {cells[1]} | {ratio:.0f} |"


def _minus(rows: Sequence[Row], dense: dict[int, float], key: str) -> str:
    pairs = [(r[key], dense[r["seed"]]) for r in rows if r[key] is not None and r["seed"] in dense]
    if not pairs:
        return "—"
    if rows[0]["metric"] == "perplexity":
        return interval([100 * (a / b - 1) for a, b in pairs], 1, "±", sign="+", unit=" %")
    return interval([a - b for a, b in pairs], 2, "±", sign="+")


def interval(
    values: Sequence[float], digits: int, mark: str, sign: str = "", unit: str = ""
) -> str:
    """Mean and half width of its 95 % confidence interval; one value stands alone."""
    text = f"{mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return text + unit
    half = STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * stdev(values) / len(values) ** 0.5
    return f"{text} {mark} {half:.{digits}f}{unit}"


# What the picture shows: title, and the setting, arms and learning rates of its rows.
RECIPE = "dgc,warmup_epochs=0.1,density=0.0035,value_bits=1"
GPT_RECIPE = "dgc,min_selected=1,density=0.008,value_bits=1"
PANELS = (
    ("LeNet-5", "lenet5", 5, ("dense", 0.05), (RECIPE, 0.1)),
    ("ResNet-20, density 0.001", "resnet20", 8, ("dense", 0.1), ("dgc,warmup_epochs=0.5", 0.1)),
    ("LeNet-300-100", "lenet300", 50, ("dense", 0.1), (RECIPE, 0.15)),
    ("byte GPT, density 0.008", "gpt64", 256, ("dense", 0.008), (GPT_RECIPE, 0.008)),
)


def picture(rows: Sequence[Row], path: Path) -> None:
    """The result after each epoch, dense and compressed: means and ranges of the seeds of both."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(3 * len(PANELS), 2.6), dpi=100)
    for axis, (title, task, epochs, *arms) in zip(axes, PANELS, strict=True):
        own = [_rows(rows, task=task, epochs=epochs, arm=arm, lr=lr) for arm, lr in arms]
        common = {row["seed"] for row in own[0]} & {row["seed"] for row in own[1]}
        for each, color in zip(own, ("tab:gray", "tab:red"), strict=True):
            _curve(axis, [row for row in each if row["seed"] in common], color)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def _rows(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Those of four workers with a cosine that have these values."""
    wanted |= {"workers": 4, "schedule": "cosine"}
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _curve(axis: Any, rows: Sequence[Row], color: str) -> None:
    ratio = mean(row["stats"]["compression_ratio"] for row in rows)
    label = "dense" if rows[0]["arm"].startswith("dense") else f"dgc, 1/{ratio:.0f} of the bytes"
    points = list(zip(*(row["curve"] for row in rows), strict=True))
    x = range(1, len(points) + 1)
    axis.plot(
        x, list(map(mean, points)), "o-" if len(x) < 20 else "-", ms=2.5, color=color, label=label
    )
    low, high = list(map(min, points)), list(map(max, points))
    axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    axis.set_ylabel("accuracy, %" if rows[0]["metric"] == "accuracy" else "perplexity")
