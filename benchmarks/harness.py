"""What every benchmark shares: fair timing, what it ran on, tables, results as JSON."""

import ctypes
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("dgc", "torch", "numpy", "numba", "triton")


def setup() -> dict[str, Any]:
    """Hardware, commit, versions and the command line, as every result file holds them."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *_relative(sys.orig_argv[1:])]),
        "commit": commit,
        "cpu": _cpu(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _relative(arguments: Sequence[str]) -> list[str]:
    root = RESULTS.parent.parent
    return [a.removeprefix(f"{root}/") for a in arguments]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def interpret_triton() -> None:
    """Without a GPU, run its kernels in Triton's interpreter; before they are first imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def medians_ms(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each function in milliseconds.

    Every round calls each function once, so that a machine that gets busier slows all alike. One
    round before the first is not counted. Where there is a GPU, its work is waited for.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) * 1e3 for name, taken in times.items()}


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """By how much this process's memory on `device` rises while `function` runs (CPU: on Linux)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - held
    # Freed memory that the process has kept would hide what `function` takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """`rows` as a Markdown table; its columns are the keys of the first row."""
    head = list(rows[0])
    cells = [head, *([_cell(row.get(name, "")) for name in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save(name: str, results: Mapping[str, object]) -> Path:
    """Write `setup()` and `results` to benchmarks/results/`name`.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**setup(), **results}, indent=1) + "\n")
    return path
