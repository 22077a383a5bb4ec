"""Where a file is written: whole or not at all, through links, to pipes, and where it cannot be."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dgc.errors import ConfigError
from dgc.model import export, load, save, save_state
from tests.model.network import net


def test_two_threads_that_save_to_one_path(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: save(net(seed % 2), tmp_path / "m.dgc"), range(20)))
    assert [p.name for p in tmp_path.iterdir()] == ["m.dgc"]
    load(net(), tmp_path / "m.dgc")


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.dgc"
    save(net(0), path)
    old = path.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no space left")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, crash)
            with pytest.raises(OSError, match="no space"):
                save(net(1), path)
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["m.dgc"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_an_old_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "m.dgc"
    path.touch()
    path.chmod(mode)
    save(net(), path)
    export(path, path)
    assert path.stat().st_mode & 0o777 == mode
    assert load_file(path).keys() == net().state_dict().keys()


@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_followed(tmp_path: Path, dangling: bool) -> None:
    real, link = tmp_path / "folder" / "real", tmp_path / "link"
    real.parent.mkdir()
    if not dangling:
        real.write_bytes(b"old")
    link.symlink_to(Path("folder") / "real")
    save(net(), link)
    assert link.is_symlink()
    load(net(9), real)
    assert list(real.parent.iterdir()) == [real]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    state, pipe = {"w": torch.ones(3)}, tmp_path / "pipe"
    save_state(state, tmp_path / "m.dgc")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_state(state, pipe)
    assert pipe.is_fifo()
    assert os.read(reader, 10_000) == (tmp_path / "m.dgc").read_bytes()
    os.close(reader)


def test_what_is_no_place_for_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", "..", "/", tmp_path):
        with pytest.raises(ConfigError, match="is a folder"):
            save(net(), path)
    with pytest.raises(ConfigError, match="lies in no folder"):
        export("missing", "no/folder")
    assert not list(tmp_path.iterdir())
