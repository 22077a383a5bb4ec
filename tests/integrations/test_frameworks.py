"""The frameworks' own training loops, each on two gloo ranks under torchrun."""

from pathlib import Path

import pytest

from dgc.errors import MissingPackageError
from dgc.integrations import need
from tests.launching import ROOT, torchrun


@pytest.mark.parametrize("framework", ["accelerate", "trainer", "lightning"])
def test_trains_and_resumes(framework: str, tmp_path: Path) -> None:
    """The scripts check steps, bytes, equal ranks, and a resumed run that ends bit for bit equal."""
    script = ROOT / "tests" / "ranks" / f"{framework}_loop.py"
    done = torchrun(2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_a_missing_framework_is_named_with_its_command() -> None:
    with pytest.raises(MissingPackageError, match="pip install no-such-framework"):
        need(("no_such_framework",), "no-such-framework")


def test_a_broken_framework_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_framework.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        need(("broken_framework",), "broken-framework")
