"""How fast is a pruned layer's product in CSR, beside the dense one?

    python -m benchmarks.bench_sparse [--rounds 15]

A 4096 × 9216 matrix with zeros anywhere times a batch of columns, on the CPU: all rows called in turn,
medians; "times as fast" is dense over CSR.
"""

import argparse
import warnings
from functools import partial

import torch

from benchmarks.harness import medians_ms, save, table

SHAPE = 4096, 9216
DENSITIES = (0.2, 0.1, 0.05, 0.01)
BATCHES = (1, 64)


def compare(density: float, batch: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    weight *= torch.rand(SHAPE, generator=generator) < density
    inputs = torch.randn(SHAPE[1], batch, generator=generator)
    csr = weight.to_sparse_csr()
    torch.testing.assert_close(csr @ inputs, weight @ inputs, rtol=1e-3, atol=1e-2)
    times = medians_ms(
        {"dense": partial(torch.matmul, weight, inputs), "csr": partial(torch.matmul, csr, inputs)},
        rounds,
    )
    return {
        "zeros %": 100 * (1 - density),
        "batch": batch,
        "dense ms": times["dense"],
        "CSR ms": times["csr"],
        "times as fast": times["dense"] / times["csr"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    rows = [compare(density, batch, rounds) for batch in BATCHES for density in DENSITIES]
    print(table(rows))
    print(save("sparse_cpu2", {"rows": rows}))


if __name__ == "__main__":
    main()
