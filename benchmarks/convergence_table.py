"""The table and the picture of convergence.py's results."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "convergence_cpu2_2026-11-23.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file of JSON lines; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(rows, picture):
    pass
