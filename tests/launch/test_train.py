"""The reference job's arguments, and who does what before its first step."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import fashion_mnist, train
from tests.launch.idx import write_data
from tests.launching import mpirun


@pytest.mark.parametrize("option", ["--epochs", "--batch"])
@pytest.mark.parametrize("number", ["0", "-3", "x"])
def test_numbers_below_one_are_refused(
    option: str,
    number: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", option, number])
    with pytest.raises(SystemExit, match="2"):
        train.arguments()
    assert f"argument {option}: " in capsys.readouterr().err


def test_a_batch_that_leaves_no_step_is_refused(tmp_path: Path) -> None:
    options = ["--data", str(write_data(tmp_path)), "--batch", "31", "--out", str(tmp_path / "out")]
    done = mpirun(2, "-m", "launch.train", "--quiet", "--backend", "gloo", *options)
    assert done.returncode != 0
    assert "ConfigError: 60 images are too few for one step of 2 ranks" in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_rank_of_each_host_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise InterruptedError

    fetching = []
    for rank in range(4):
        monkeypatch.setattr(fashion_mnist, "find", lambda folder, rank=rank: fetching.append(rank))
        place = SimpleNamespace(rank=rank, local_rank=rank % 2, comm=SimpleNamespace(barrier=stop))
        with pytest.raises(InterruptedError):
            train.train(place, SimpleNamespace(data=None))
    assert fetching == [0, 2]
