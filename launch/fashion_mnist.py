"""Find and read Fashion-MNIST (or MNIST): four IDX files, plain or gzipped.

Looked for in this order: the folder that was given, the system's package folder, the cache, the
Debian package unpacked into the cache without root, the data set's own download.

    python -m launch.fashion_mnist           # prints the folder it found
"""

import argparse
import gzip
import hashlib
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.errors import ConfigError

SYSTEM = Path("/usr/share/datasets/fashion-mnist")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "fashion-mnist"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# MD5 of the gzipped files, as the data set's own page gives them.
FILES = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}


class Data(NamedTuple):
    """Images float32 `[n, 1, 28, 28]`, of mean 0 and variance 1 over the training set; labels int64 `[n]`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(folder: str | Path | None = None) -> Data:
    """Read the data set from `folder`, or from wherever `find` finds it."""
    found = find(folder)
    images, labels, test_images, test_labels = (_read_idx(_path(found, name)) for name in FILES)
    scaled = images.float().unsqueeze(1)
    mean, std = scaled.mean(), scaled.std()
    return Data(
        scaled.sub_(mean).div_(std),
        labels.long(),
        (test_images.float().unsqueeze(1) - mean) / std,
        test_labels.long(),
    )


def find(folder: str | Path | None = None) -> Path:
    """The folder that holds all four files, fetching them where none does.

    Raises:
        ConfigError: a folder was given and lacks a file, or nothing could be fetched.
    """
    if folder is not None:
        missing = [name for name in FILES if _path(Path(folder), name) is None]
        if missing:
            raise ConfigError(
                f"{folder} has no {missing[0]} or {missing[0]}.gz: give the folder of the IDX files"
            )
        return Path(folder)
    for candidate in (SYSTEM, CACHE):
        if all(_path(candidate, name) for name in FILES):
            return candidate
    errors = []
    for fetch in (_fetch_debian, _fetch_download):
        try:
            fetch()
            return CACHE
        except (OSError, subprocess.SubprocessError, ConfigError) as error:
            errors.append(f"{fetch.__name__[7:]}: {error}")
    raise ConfigError(
        "Fashion-MNIST was not found and could not be fetched "
        f"({'; '.join(errors)}). Install the package {DEBIAN_PACKAGE}, or give the folder of the IDX files"
    )


def _path(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _fetch_debian() -> None:
    with tempfile.TemporaryDirectory() as work:
        # Package lists of its own: a fresh machine has none, and the system's need root.
        own = [f"-o{key}={work}" for key in ("Dir::State", "Dir::Cache")]
        _run("apt-get", *own, "update", cwd=work)
        _run("apt-get", *own, "download", DEBIAN_PACKAGE, cwd=work)
        deb = next(Path(work).glob(f"{DEBIAN_PACKAGE}*.deb"))
        _run("dpkg", "-x", str(deb), work, cwd=work)
        _install({name: _path(Path(work) / SYSTEM.relative_to("/"), name) for name in FILES})


def _run(*command: str, cwd: str) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=300)


def _fetch_download() -> None:
    with tempfile.TemporaryDirectory() as work:
        paths: dict[str, Path | None] = {}
        for name, md5 in FILES.items():
            path = Path(work) / f"{name}.gz"
            with (
                urllib.request.urlopen(f"{URL}{name}.gz", timeout=60) as source,
                path.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if found != md5:
                raise ConfigError(f"{URL}{name}.gz has MD5 {found}, not {md5}")
            paths[name] = path
        _install(paths)


def _install(paths: dict[str, Path | None]) -> None:
    """Move complete files into the cache, each in one step."""
    CACHE.mkdir(parents=True, exist_ok=True)
    # A folder of its own: hosts that share the cache may fetch at the same time.
    with tempfile.TemporaryDirectory(dir=CACHE) as own:
        for name, path in paths.items():
            if path is None:
                raise ConfigError(f"{name} is missing from what was fetched")
            partial = Path(own) / path.name
            shutil.copyfile(path, partial)
            partial.replace(CACHE / path.name)


def _read_idx(path: Path | None) -> Tensor:
    """An IDX file of unsigned bytes: big-endian magic 0x0000_08_rank, sizes, then the data."""
    assert path is not None
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (magic,) = struct.unpack_from(">I", raw)
        if magic >> 8 != 0x08:
            raise ConfigError(f"{path} is not an IDX file of bytes: it begins with {raw[:4]!r}")
        rank = magic & 0xFF
        shape = struct.unpack_from(f">{rank}I", raw, 4)
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it") from error
    data = bytearray(raw[4 + 4 * rank :])
    if not data or len(data) != math.prod(shape):
        sizes = " x ".join(map(str, shape))
        raise ConfigError(f"{path} is damaged ({len(data)} bytes, not {sizes}): delete it")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the IDX files")
    try:
        print(find(parser.parse_args().data))
    except ConfigError as error:
        sys.exit(f"error: {error}")
