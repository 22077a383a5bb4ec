"""The frameworks' own training loops, each on two gloo ranks under torchrun."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dgc
from dgc.errors import MissingPackageError
from dgc.integrations import clips, need
from tests.launching import ROOT, torchrun


@pytest.mark.parametrize("framework", ["accelerate", "trainer", "lightning"])
def test_trains_and_resumes(framework: str, tmp_path: Path) -> None:
    """The scripts check steps, bytes, equal ranks, and a resumed run that ends bit for bit equal."""
    script = ROOT / "tests" / "ranks" / f"{framework}_loop.py"
    done = torchrun(2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


ADAM, SGD = (partial(each, lr=0.1) for each in (torch.optim.AdamW, torch.optim.SGD))


@pytest.mark.parametrize(
    ("optimizer", "config", "limit", "refused"),
    [
        (SGD, dgc.DGC(), 1.0, True),
        (SGD, dgc.DGC(), 0.0, False),
        (SGD, dgc.DGC(), None, False),
        (SGD, dgc.DGC(), torch.inf, False),
        (SGD, dgc.Dense(), 1.0, False),
        (ADAM, dgc.DGC(), 1.0, False),
        (ADAM, dgc.DGC(exclude=("bias",)), 1.0, True),
        (ADAM, dgc.DGC(momentum_correction=False), 1.0, True),
    ],
)
def test_a_limit_on_what_arrives_is_refused(
    optimizer: Any, config: Any, limit: float | None, refused: bool
) -> None:
    params = [nn.Parameter(torch.ones(1))]
    clipped = clips(optimizer(params), config, limit)
    assert clipped == refused


def test_a_missing_framework_is_named_with_its_command() -> None:
    with pytest.raises(MissingPackageError, match="pip install no-such-framework"):
        need(("no_such_framework",), "no-such-framework")


def test_a_broken_framework_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_framework.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        need(("broken_framework",), "broken-framework")
