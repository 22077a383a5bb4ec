"""Compiled loops are kept on disk where that is possible, and run without it."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core.caching import CacheImpl, IndexDataCacheFile, UserProvidedCacheLocator

from dgc.core.kernels.compiled import compiled
from tests.launching import environment


def twice(n: Any) -> Any:
    return 2 * n


def fresh() -> Any:
    """The loop as another process finds it."""
    return compiled()(twice)


def hits() -> int:
    loop = fresh()
    assert loop(3) == 6
    return sum(loop.stats.cache_hits.values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one that loops are kept in."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(CacheImpl, "_locator_classes", [UserProvidedCacheLocator])
    return tmp_path / "kept"


def kept(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*{suffix}"))


def test_a_second_start_finds_what_the_first_compiled(folder: Path) -> None:
    assert (hits(), hits()) == (0, 1)


def test_loops_run_where_no_folder_can_be_written(folder: Path) -> None:
    folder.write_text("a file in its place")
    with pytest.warns(UserWarning, match="no folder can be written.*NUMBA_CACHE_DIR"):
        assert hits() == 0


@pytest.mark.parametrize("part", ["_save_index", "_save_data"])
def test_loops_run_where_the_disk_is_full(
    part: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, part, full)
        with pytest.warns(UserWarning, match="No space left.*NUMBA_CACHE_DIR"):
            assert hits() == 0
    assert not kept(folder, ".nbi")
    assert (hits(), hits()) == (0, 1)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_cut_files_are_written_again(share: float, suffix: str, folder: Path) -> None:
    fresh()(3)
    (path,) = kept(folder, suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert (hits(), hits()) == (0, 1)


def test_files_of_other_bytes_are_written_again(folder: Path) -> None:
    fresh()(3)
    for path in kept(folder, ".nb?"):
        path.write_bytes(b"\x80garbage" * 100)
    assert (hits(), hits()) == (0, 1)


def test_a_file_of_other_types_is_not_run(folder: Path) -> None:
    loop = fresh()
    loop(3)
    loop(1.5)
    integers, floats = kept(folder, ".nbc")
    floats.write_bytes(integers.read_bytes())
    assert fresh()(1.5) == 3.0


def test_a_disabled_compiler_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import dgc.core.kernels.cpu"],
        env=environment(NUMBA_DISABLE_JIT="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ConfigError: NUMBA_DISABLE_JIT is set" in done.stderr
