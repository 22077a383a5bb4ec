"""A data set in the format of MNIST's, of random images."""

import math
import random
import struct
from pathlib import Path

from launch.fashion_mnist import FILES


def write_data(folder: Path, train: int = 60, test: int = 10) -> Path:
    """Four IDX files in `folder`, which it returns."""
    draw = random.Random(0)
    for name in FILES:
        count = train if name.startswith("train") else test
        shape = (count, 28, 28) if "images" in name else (count,)
        below = 256 if "images" in name else 10
        header = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
        data = bytes(draw.choices(range(below), k=math.prod(shape)))
        (folder / name).write_bytes(header + data)
    return folder
