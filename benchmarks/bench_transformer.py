"""A 22 M-parameter sentence encoder compressed after training, without data: bytes and quality.

Quality is of the embeddings of sentences, against the original model's: mean cosine, and how often
a sentence's nearest neighbour among the others is the same.

    python benchmarks/bench_transformer.py --out transformer_cpu2
"""

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dgc.model
from benchmarks import harness, minilm
from dgc.model.bag import module_of

SETTINGS = [(bits, density) for density in (1.0, 0.5) for bits in (8, 6, 5, 4)]


def quality(found: Tensor, original: Tensor) -> dict[str, float]:
    """Agreement of unit embeddings `[n, d]`."""
    return {
        "mean cosine": float((found * original).sum(1).mean()),
        "least cosine": float((found * original).sum(1).min()),
        "same neighbour %": 100 * float((_nearest(found) == _nearest(original)).double().mean()),
    }


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.t()
    return similarity.fill_diagonal_(-2).argmax(1)


def compress(weights: Path, out: Path, bits: int, density: float) -> dgc.model.Report:
    """As `dgc compress` does."""
    model = module_of(load_file(weights))
    if density < 1:
        dgc.model.prune(model, density)
    dgc.model.share(model, bits)
    return dgc.model.save(model, out)


def measured(weights: Path, out: Path, bits: int, density: float) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, and by how many bytes `compress` raises memory at most."""
    # What k-means and the coder take to import is not the model's.
    dgc.model.save(dgc.model.share(torch.nn.Linear(100, 100), 4), out)
    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    peak = harness.peak_bytes(lambda: compress(weights, out, bits, density))
    return time.perf_counter() - start, time.process_time() - cpu, peak


def main() -> None:
    """One row for each setting, and for the original."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="folder of model.safetensors and vocab.txt")
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--out", help="name of the result file, without .json")
    options = parser.parse_args()
    folder = minilm.folder(options.weights)
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {word: i for i, word in enumerate(words)}
    texts = [minilm.tokens(s, vocabulary) for s in minilm.sentences(options.sentences)]
    weights = folder / "model.safetensors"
    original = minilm.embed(load_file(weights), texts)
    dense = weights.stat().st_size
    rows: list[dict[str, object]] = []
    # A process for each setting, as a user has: memory that was freed in pieces comes in between.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as work,
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh,
    ):
        path = Path(work) / "model.dgc"
        for bits, density in SETTINGS:
            seconds, cpu, peak = fresh.submit(measured, weights, path, bits, density).result()
            start = time.perf_counter()
            state = dgc.model.read_state(path)
            load_seconds = time.perf_counter() - start
            rows.append(
                {
                    "bits": bits,
                    "density": density,
                    "bytes": path.stat().st_size,
                    "ratio": round(dense / path.stat().st_size, 2),
                    **{
                        k: round(v, 4)
                        for k, v in quality(minilm.embed(state, texts), original).items()
                    },
                    "seconds": round(seconds, 1),
                    "CPU seconds": round(cpu, 1),
                    "load seconds": round(load_seconds, 1),
                    "peak / model": round(peak / dense, 2),
                }
            )
            print(rows[-1], flush=True)
    print(f"{dense:,} bytes, {len(texts)} sentences\n{harness.table(rows)}")
    if options.out:
        harness.save(options.out, {"dense_bytes": dense, "sentences": len(texts), "rows": rows})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
