"""Pictures of what was measured and of what a file holds, with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgc.core.entropy import count_symbols
from dgc.errors import ConfigError, MissingPackageError
from dgc.model.layer import Layer
from dgc.model.report import Report


def _axes(count: int, height: float) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, height * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 1, squeeze=False)
    return figure, [row[0] for row in axes]


def _plain(name: str) -> str:
    """`name` without what matplotlib takes for the start of a formula."""
    return name.replace("$", r"\$")


def line_picture(
    lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, path: str | Path
) -> None:
    """Write one line a name through its (x, y) points, x on a logarithmic axis."""
    figure, (axes,) = _axes(1, 5.0)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=_plain(name))
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
    axes.legend()
    _write(figure, path)


def file_picture(report: Report, layers: Mapping[str, Layer], path: str | Path) -> None:
    """Write where the file's bytes are, and how often each shared value of a layer occurs."""
    shared = {n: la for n, la in layers.items() if not la.literal and la.levels.numel()}
    figure, axes = _axes(1 + min(8, len(shared)), 2.6)
    rows = [(row.name, row.file_bytes) for row in report.rows] + [("header", report.header_bytes)]
    largest = sorted(rows, key=lambda row: row[1])[-20:]
    axes[0].barh([_plain(name) for name, _ in largest], [size for _, size in largest])
    axes[0].set(xlabel=f"bytes of {report.file_bytes} ({report.compression_ratio:.1f} x smaller)")
    by_size = sorted(shared.items(), key=lambda item: -item[1].codes.numel())
    for axis, (name, layer) in zip(axes[1:], by_size, strict=False):
        counts = count_symbols(layer.codes, layer.levels.numel() + 1)[1:]
        values = layer.levels.double().tolist()
        axis.vlines(values, 0, counts)
        axis.set(xlabel=f"value in {_plain(name)}", ylabel="weights", ylim=(0, None))
    _write(figure, path)


def _write(figure: Any, path: str | Path) -> None:
    kinds = sorted(figure.canvas.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in kinds:
        raise ConfigError(f"{str(path)!r} names no kind of picture: end it in one of {kinds}")
    figure.savefig(path)
