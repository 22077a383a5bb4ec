"""How small does the final model get, at what accuracy? The two LeNets, on Fashion-MNIST.

For each seed: train dense; from there train on dense for as many epochs, or prune, retrain, share,
retrain and save with Huffman codes, or with the default coder and the entropy penalty. The baseline
is the better of the two dense models. Means over seeds. On the identical weights: other containers, and codes against entropy.

    python benchmarks/bench_model.py --out model_cpu2
    python benchmarks/bench_model.py --data FOLDER_OF_IDX_FILES       # MNIST, or Fashion-MNIST
"""

import argparse
import copy
import io
import json
import statistics
import sys
import tempfile
import zlib
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dgc.model
from benchmarks import harness
from launch import fashion_mnist, models
from launch.compress import Recipe, accuracy, compress_model, train

TEACH = {"lr": 3e-3, "distill_weight": 0.9}
RECIPES: dict[str, dict[str, Recipe]] = {
    "lenet300": {
        "huffman": Recipe(
            density={"1": 0.06, "3": 0.09, "5": 0.26}, bits=5, coder="huffman", **TEACH
        ),
        "ans + penalty": Recipe(
            density={"1": 0.045, "3": 0.07, "5": 0.26}, bits=4, penalty=0.005, **TEACH
        ),
        "smallest": Recipe(
            density={"1": 0.02, "3": 0.05, "5": 0.26},
            bits={"1": 4, "3": 4, "5": 4, "1.bias": 4, "3.bias": 4},
            penalty=0.01,
            **TEACH,
        ),
    },
    "lenet5": {
        "huffman": Recipe(
            density={"0": 0.7, "2": 0.2, "5": 0.05, "7": 0.19}, bits=5, coder="huffman", **TEACH
        ),
        "ans + penalty": Recipe(
            density={"0": 0.7, "2": 0.2, "5": 0.02, "7": 0.15}, bits=4, penalty=0.005, **TEACH
        ),
        "smallest": Recipe(
            density={"0": 0.7, "2": 0.16, "5": 0.009, "7": 0.1},
            bits={"0": 4, "2": 4, "5": 4, "7": 4, "5.bias": 4},
            penalty=0.005,
            **TEACH,
        ),
    },
}
EPOCHS = {  # dense first; then retraining while pruning; then training of shared values
    "lenet300": (8.0, 10.0, 2.0),
    "lenet5": (4.0, 6.0, 1.0),
}


def run_seed(name: str, seed: int, data: fashion_mnist.Data, scale: float) -> dict[str, Any]:
    """All recipes of one model and one seed."""
    dense_epochs, prune_epochs, share_epochs = (scale * e for e in EPOCHS[name])
    model = models.build(name, seed).to(memory_format=torch.channels_last)
    train(model, data, epochs=dense_epochs, lr=1e-3, seed=seed)
    baseline = copy.deepcopy(model)
    train(baseline, data, epochs=prune_epochs, lr=1e-3, seed=seed)
    train(baseline, data, epochs=share_epochs, lr=2e-4, seed=seed)
    test = (data.test_images, data.test_labels)
    result: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "trained": (trained := accuracy(model, *test)),
        "trained_on": (trained_on := accuracy(baseline, *test)),
        "baseline": max(trained, trained_on),
        "runs": {},
    }
    recipes = dict(RECIPES[name])
    hardest = list(recipes)[-1]
    recipes[f"{hardest}, no distillation"] = replace(recipes[hardest], distill_weight=0.0)
    for label, recipe in recipes.items():
        full = replace(recipe, prune_epochs=prune_epochs, share_epochs=share_epochs)
        print(f"{name} seed {seed}: {label}", flush=True)
        result["runs"][label] = run_recipe(copy.deepcopy(model), data, full, seed)
    return result


def run_recipe(
    model: nn.Module, data: fashion_mnist.Data, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """One compressed model: stages, the report, and other containers of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.dgc"
        stages, report = compress_model(model, data, path, recipe, seed=seed, log=_flushed)
        fresh = dgc.model.load(copy.deepcopy(model), path)
        final = accuracy(fresh, data.test_images, data.test_labels)
        assert path.stat().st_size == report.file_bytes
        containers = compare_containers(model, Path(folder))
    return {
        "recipe": asdict(recipe),
        "stages": [asdict(stage) for stage in stages],
        "accuracy_loaded": final,
        "dense_bytes": report.dense_bytes,
        "file_bytes": report.file_bytes,
        "compression_ratio": report.compression_ratio,
        "header_bytes": report.header_bytes,
        "rows": [asdict(row) for row in report.rows],
        "containers": containers,
    }


def _flushed(line: str) -> None:
    print(f"  {line}", flush=True)


def compare_containers(model: nn.Module, folder: Path) -> dict[str, int]:
    """Bytes of the identical weights in each container, all in full precision."""
    state = {n: t.detach().clone() for n, t in dgc.model.plain_state(model).items()}
    raw = b"".join(t.contiguous().numpy().tobytes() for t in state.values())
    sizes = {
        "torch.save": len(_torch_save(state)),
        "torch.save, CSR": len(_torch_save({n: _csr(t) for n, t in state.items()})),
        "zlib -9": len(zlib.compress(raw, 9)),
    }
    if find_spec("zstandard"):
        import zstandard

        sizes["zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(raw))
    for coder in ("huffman", "ans"):
        saved = dgc.model.save(model, folder / "other.dgc", coder=coder)
        sizes[f"dgc, {coder}"] = saved.file_bytes
        rows = [row for row in saved.rows if row.name in dgc.model.weights_of(model)]
        sizes[f"weights, {coder}"] = sum(row.file_bytes for row in rows)
    sizes["weights, entropy"] = sum(row.entropy_bytes for row in rows)
    return sizes


def _torch_save(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _csr(tensor: Tensor) -> Tensor:
    """CSR with 32-bit indices, where a matrix has enough zeros to gain by it."""
    if tensor.dim() < 2:
        return tensor
    flat = tensor.flatten(1).to_sparse_csr()
    return torch.sparse_csr_tensor(
        flat.crow_indices().int(), flat.col_indices().int(), flat.values(), flat.shape
    )


def summary(results: list[dict[str, Any]]) -> list[dict[str, object]]:
    """A row for each model and recipe: means over seeds."""
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys(r["model"] for r in results):
        mine = [r for r in results if r["model"] == name]
        for label in mine[0]["runs"]:
            runs = [r["runs"][label] for r in mine]
            change = [run["accuracy_loaded"] - r["baseline"] for run, r in _pairs(runs, mine)]
            rows.append(
                {
                    "model": name,
                    "recipe": label,
                    "seeds": len(mine),
                    "baseline %": round(statistics.mean(r["baseline"] for r in mine), 2),
                    "compressed %": round(statistics.mean(r["accuracy_loaded"] for r in runs), 2),
                    "change": round(statistics.mean(change), 2),
                    "change by seed": " ".join(f"{c:+.2f}" for c in change),
                    "bytes": round(statistics.mean(r["file_bytes"] for r in runs)),
                    "ratio": round(statistics.mean(r["compression_ratio"] for r in runs), 1),
                }
            )
    return rows


def _pairs(runs: list[Any], mine: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(runs, mine, strict=True))


def container_rows(results: list[dict[str, Any]]) -> list[dict[str, object]]:
    """A row for each model and recipe: mean bytes in each container."""
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys(r["model"] for r in results):
        mine = [r for r in results if r["model"] == name]
        for label in mine[0]["runs"]:
            every = [r["runs"][label]["containers"] for r in mine]
            means = {c: round(statistics.mean(e[c] for e in every)) for c in every[0]}
            rows.append({"model": name, "recipe": label, **means})
    return rows


def _earlier(out: str | None, models_now: list[str]) -> list[dict[str, Any]]:
    """What the result file already holds of the models that are not run now."""
    path = harness.RESULTS / f"{out}.json"
    if out is None or not path.exists():
        return []
    return [r for r in json.loads(path.read_text())["seeds"] if r["model"] not in models_now]


def main() -> None:
    """Run what the command line asks for; print the tables and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of IDX files")
    parser.add_argument("--models", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all epochs")
    parser.add_argument("--out", help="name of the result file, without .json")
    options = parser.parse_args()
    data = fashion_mnist.load(options.data)
    results = _earlier(options.out, options.models)
    for name in options.models:
        for seed in options.seeds:
            results.append(run_seed(name, seed, data, options.scale))
            tables = {"summary": summary(results), "containers": container_rows(results)}
            if options.out:  # after each seed: hours of work survive an interruption
                harness.save(options.out, {**tables, "epochs": EPOCHS, "seeds": results})
    print(harness.table(tables["summary"]), "", harness.table(tables["containers"]), sep="\n")


if __name__ == "__main__":
    main()
