"""Reading and fetching the data set of the reference job."""

import gzip
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgc.errors import ConfigError
from launch import fashion_mnist
from tests.launch.idx import write_data

IMAGES = "train-images-idx3-ubyte"


def test_plain_and_gzipped_files_read_alike(tmp_path: Path) -> None:
    plain = fashion_mnist.load(write_data(tmp_path))
    assert plain.train_images.shape == (60, 1, 28, 28)
    assert plain.test_labels.shape == (10,)
    for name in fashion_mnist.FILES:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    for found, expected in zip(fashion_mnist.load(tmp_path), plain, strict=True):
        assert torch.equal(found, expected)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut header": lambda raw: raw[:10],
    "no data": lambda raw: raw[:16],
    "cut": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0",
}
GZIP_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut header": lambda raw: raw[:5],
    "cut": lambda raw: raw[:-1],
    "changed": lambda raw: raw[:1000] + bytes(100) + raw[1100:],
    "not gzipped": lambda raw: bytes(100),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = write_data(tmp_path) / IMAGES
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} is damaged .*: delete it"):
        fashion_mnist.load(tmp_path)


@pytest.mark.parametrize("damage", GZIP_DAMAGES)
def test_a_damaged_gzip_file_is_named(damage: str, tmp_path: Path) -> None:
    plain = write_data(tmp_path) / IMAGES
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(GZIP_DAMAGES[damage](gzip.compress(plain.read_bytes())))
    plain.unlink()
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} is damaged .*: delete it"):
        fashion_mnist.load(tmp_path)


def test_another_type_of_data_is_refused(tmp_path: Path) -> None:
    path = write_data(tmp_path) / IMAGES
    path.write_bytes(b"\0\0\x0d\x03" + path.read_bytes()[4:])
    with pytest.raises(ConfigError, match="not an IDX file of bytes"):
        fashion_mnist.load(tmp_path)


def test_two_that_fetch_at_once_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fetched").mkdir()
    folder = write_data(tmp_path / "fetched")
    fetched: dict[str, Path | None] = {name: folder / name for name in fashion_mnist.FILES}
    copy, copied = shutil.copyfile, []

    def interrupted(source: Path, target: Path) -> None:
        copy(source, target)
        copied.append(target)
        if len(copied) == 1:
            fashion_mnist._install(fetched)

    monkeypatch.setattr(fashion_mnist, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(shutil, "copyfile", interrupted)
    fashion_mnist._install(fetched)
    assert len(copied) == 8
    found = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert found == {name: (folder / name).read_bytes() for name in fashion_mnist.FILES}
