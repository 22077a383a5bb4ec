"""FSDP2 over a mesh of 2 × 2 gloo ranks; one start serves all checks."""

from typing import Any

import pytest

from tests.processes import run_processes
from tests.train.fsdp_checks import CHECKS


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    return run_processes(4, {check.__name__: check for check in CHECKS})


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_four_ranks(found: dict[str, list[Any]], check: str) -> None:
    """Every check returns None on every rank, not a traceback."""
    assert found[check] == [None] * 4, "\n".join(str(each) for each in found[check])
