"""Horovod's communication in real processes, and what the Horovod wrapper refuses."""

import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch

import dgc
import dgc.horovod as hvd
from dgc.comm.horovod import HorovodCommunicator, import_horovod
from dgc.errors import ConfigError, MissingPackageError
from tests.launching import ROOT, environment, mpirun
from tests.needs import needs_horovod

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def horovodrun(ranks: int, script: str, *args: str) -> "subprocess.CompletedProcess[str]":
    return _launcher("", ranks, script, *args)


def horovodrun_gloo(ranks: int, script: str, *args: str) -> "subprocess.CompletedProcess[str]":
    return _launcher("--gloo", ranks, script, *args)


def _launcher(
    flags: str, ranks: int, script: str, *args: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["launch/horovodrun.sh", str(ranks), script, *args],
        cwd=ROOT,
        env=environment(HOROVODRUN_FLAGS=flags, PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_horovod
@pytest.mark.parametrize(
    ("launch", "ranks"), [(mpirun, 2), (mpirun, 4), (horovodrun, 2), (horovodrun_gloo, 3)]
)
def test_collectives(launch: Launch, ranks: int) -> None:
    done = launch(ranks, "tests/ranks/collectives.py", "horovod")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "collectives agree" in done.stdout


@needs_horovod
@pytest.mark.parametrize(
    ("script", "words", "launch", "ranks"),
    [
        ("training.py", "training agrees", horovodrun, 2),
        ("horovod_script.py", "Horovod scripts agree", mpirun, 4),
        ("horovod_script.py", "Horovod scripts agree", horovodrun_gloo, 2),
    ],
)
def test_training(script: str, words: str, launch: Launch, ranks: int) -> None:
    done = launch(ranks, f"tests/ranks/{script}", "horovod")
    assert done.returncode == 0, done.stdout + done.stderr
    assert words in done.stdout


@needs_horovod
@pytest.mark.parametrize(("launch", "how"), [(mpirun, "hangs"), (horovodrun_gloo, "dies")])
def test_a_dead_rank_stops_the_others(launch: Launch, how: str) -> None:
    done = launch(2, "tests/ranks/dying.py", "horovod", how)
    assert done.returncode != 0
    if how == "hangs":
        assert "rank 0 stopped in time: a collective did not end within 3 s" in done.stdout


@needs_horovod
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"op": "Adasum"}, "op is Adasum: only Average"),
        ({"op": "Sum"}, "op is Sum: only Average"),
        ({"num_groups": 2}, "num_groups is 2"),
        ({"groups": [[]]}, r"groups is \[\[\]\]"),
        ({"sparse_as_dense": True}, "sparse_as_dense is True"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is 2.0"),
        ({"compression": "fp16"}, "Horovod's FP16Compressor"),
        ({"compression": "none"}, "Horovod's NoneCompressor"),
        ({}, "call hvd.init"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    if "op" in options:
        options = {"op": getattr(hvd, options["op"])}
    if "compression" in options:
        options = {"compression": getattr(hvd.Compression, options["compression"])}
    model = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=words):
        hvd.DistributedOptimizer(sgd, model.named_parameters(), **options)


def test_join_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"join\(\) is not supported"):
        hvd.join()


@needs_horovod
def test_the_rest_is_horovods_own() -> None:
    import horovod.torch

    assert hvd.allreduce is horovod.torch.allreduce
    assert hvd.Average == horovod.torch.Average
    with pytest.raises(AttributeError):
        _ = hvd.no_such_function


@needs_horovod
def test_the_signature_is_horovods() -> None:
    import horovod.torch

    theirs = list(signature(horovod.torch.DistributedOptimizer).parameters)
    assert list(signature(hvd.DistributedOptimizer).parameters)[: len(theirs)] == theirs


@needs_horovod
def test_a_timeout_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="timeout_seconds is 0"):
        HorovodCommunicator(timeout_seconds=0)


def test_without_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(MissingPackageError, match=r"launch/install_horovod\.sh"):
        import_horovod()
    with pytest.raises(MissingPackageError):
        dgc.init("horovod")


@needs_horovod
def test_optimizers_do_not_take_each_others_messages() -> None:
    done = mpirun(2, "tests/ranks/twins.py", "horovod", "dgc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each has its own mean" in done.stdout
