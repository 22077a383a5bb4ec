"""Decode mutated gradient messages and check that each gives a valid answer or a `WireError`.

    python -m benchmarks.fuzz_wire --count 1000000

Half of the mutants get a correct length and checksum again, so that they reach the parser and the
decoders. For every hundredth the compiled decoder is compared with the reference and the memory
that decoding takes is held against `ALLOCATION_FACTOR`.
"""

import argparse
import time
import tracemalloc
import zlib
from collections import Counter
from itertools import pairwise

import numpy as np
import torch

from benchmarks.harness import interpret_triton
from dgc.core import Sparse, SparseBatch
from dgc.core.kernels import codec_reference
from dgc.core.kernels.codec_reference import Body, Status
from dgc.core.quantize import VALUE_BITS
from dgc.errors import WireError
from dgc.train import wire
from dgc.train.assemble import encode_rice
from dgc.train.frame import CHECKSUM_BYTES, max_frame_bytes, read_frame

ALLOCATION_FACTOR = 512
"""Bytes that decoding may allocate for each byte of a message, beside `ALLOCATION_FIXED`."""
ALLOCATION_FIXED = 1 << 20


def seal(message: bytes) -> bytes:
    """The same bytes with a length and checksum that fit."""
    content = bytearray(message[:-CHECKSUM_BYTES])
    content[6:10] = len(message).to_bytes(4, "little")
    return bytes(content) + zlib.crc32(content).to_bytes(4, "little")


def seeds(rng: np.random.Generator) -> list[bytes]:
    """Valid messages of every width and both codes, of several tensors and densities."""
    out = []
    for bits in VALUE_BITS:
        for density in (0.001, 0.02, 0.3, 1.0):
            tensors = [_sparse(rng, int(numel), density) for numel in rng.integers(1, 400, 4)]
            out.append(bytes(wire.encode(tensors, bits).tolist()))
            batch = SparseBatch.cat(tensors)
            size = max_frame_bytes(batch.numels, batch.counts, bits, rice=True)
            message = encode_rice(batch, bits, message_bytes=size)[0].numpy()
            out.append(message[: read_frame(message, None)[0].message_bytes].tobytes())
    return out


def _sparse(rng: np.random.Generator, numel: int, density: float) -> Sparse:
    count = max(1, int(numel * density))
    indices = np.sort(rng.choice(numel, count, replace=False))
    values = rng.standard_t(2, count).astype(np.float32)
    return Sparse(torch.from_numpy(indices), torch.from_numpy(values), numel)


def mutate(rng: np.random.Generator, message: bytes) -> bytes:
    """One to four random changes; sealed again half of the time."""
    data = bytearray(message)
    for _ in range(rng.integers(1, 5)):
        # Half of the changes strike the header and tables; few the magic, which tells nothing new.
        last = len(data) if rng.random() < 0.5 else min(40, len(data))
        at = int(rng.integers(0 if rng.random() < 0.02 else 4, last))
        kind = rng.integers(0, 6)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(0, 256)]))
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 4:
            data = data[:at]
        else:
            data[at : at + 4] = int(rng.integers(0, 1 << 32)).to_bytes(4, "little")
        if len(data) < 15:
            data.extend(rng.bytes(15))
    return seal(bytes(data)) if rng.random() < 0.5 else bytes(data)


def check(data: bytes) -> str:
    """Decode; returns "valid" or the words of the error that are always the same."""
    message = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
    try:
        found = wire.decode_batch(message)
    except WireError as error:
        words = [word for word in str(error).split() if word.isalpha()]
        return " ".join(words[:5] if words[0] not in ("magic", "checksum") else words[:1])
    for indices, values, numel in found.batch.split():
        assert (indices.diff() > 0).all()
        assert torch.isfinite(values).all()
        assert len(indices) == 0 or (indices[0] >= 0 and indices[-1] < numel)
    assert found.finite or found.batch.indices.numel() == 0
    assert len(found.used) == len(found.batch.numels) == len(found.batch.counts)
    return "valid"


def check_closely(data: bytes) -> None:
    """The reference agrees, and memory stays within the bound."""
    tracemalloc.start()
    verdict = check(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= ALLOCATION_FACTOR * len(data) + ALLOCATION_FIXED, (peak, len(data))
    try:
        header, at = read_frame(np.frombuffer(data, np.uint8), None)
    except WireError:
        assert verdict != "valid"
        return
    if header.num_values:
        bounds = pairwise(at)
        body = Body(*(np.frombuffer(data[a:b], np.uint8) for a, b in bounds))
        ends = np.cumsum(np.array(header.numels, np.int64))
        status = codec_reference.decode(
            body, header.num_values, ends, header.code, header.value_bits, header.rice
        )[-1]
        assert (status is Status.OK) == (verdict == "valid"), (status, verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    interpret_triton()  # for a GPU's messages
    rng = np.random.default_rng(arguments.seed)
    corpus, verdicts, start = seeds(rng), Counter[str](), time.perf_counter()
    for number in range(arguments.count):
        data = mutate(rng, corpus[int(rng.integers(0, len(corpus)))])
        verdicts[check(data)] += 1
        if number % 100 == 0:
            check_closely(data)
    seconds = time.perf_counter() - start
    print(f"{arguments.count} messages, seed {arguments.seed}, {seconds:.0f} s")
    for verdict, count in verdicts.most_common():
        print(f"{count:9d}  {verdict}")


if __name__ == "__main__":
    main()
