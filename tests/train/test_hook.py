"""The DDP hook and mixed precision on two gloo ranks; one start serves all checks."""

from typing import Any

import pytest

from tests.processes import run_processes
from tests.train import amp_checks, hook_checks

CHECKS = [*hook_checks.CHECKS, *amp_checks.CHECKS]


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    return run_processes(2, {check.__name__: check for check in CHECKS})


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_ranks(found: dict[str, list[Any]], check: str) -> None:
    """Every check returns None on every rank, not a traceback."""
    assert found[check] == [None, None], "\n".join(str(each) for each in found[check])
