"""How small does the final model get, at what accuracy? The two LeNets, on Fashion-MNIST.

For each seed: train dense; from there train on dense for as many epochs, or prune, retrain, share,
retrain and save with Huffman codes, or with the default coder and the entropy penalty. The baseline
is the dense model that trains on. Models are also taught by the soft targets of
`benchmarks/teacher.py`, and so is a second baseline, with dropout as in compression. Means over
seeds. On the identical weights: other containers, and codes against entropy.

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
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dgc.model
from benchmarks import harness, teacher
from launch import fashion_mnist, models
from launch.compress import Recipe, accuracy, compress_model, sgd, train

SOFT = {"distill_weight": 0.3, "temperature": 2.0}
BATCH = 256
TRAINING = {"batch": BATCH, "bf16": True}
SGD = {"optimizer": "sgd", "weight_decay": 5e-4}
LR = {"lenet300": 0.1, "lenet5": 0.05}
RECIPES: dict[str, dict[str, Recipe]] = {
    "lenet300": {
        "huffman": Recipe(
            density={"1": 0.07, "3": 0.11, "5": 0.4},
            bits=dict.fromkeys(["1", "3", "5", "1.bias", "3.bias"], 5),
            batch=BATCH,
            dropout=0.1,
            coder="huffman",
        ),
        "ans + penalty": Recipe(
            density={"1": 0.0465, "3": 0.09, "5": 0.3},
            bits=dict.fromkeys(["1", "3", "5", "1.bias", "3.bias"], 4),
            batch=BATCH,
            dropout=0.05,
            penalty=0.005,
            half=True,
        ),
    },
    "lenet5": {
        "huffman": Recipe(
            density={"0": 0.8, "2": 0.27, "5": 0.068, "7": 0.25},
            bits=dict.fromkeys(["0", "2", "5", "7", "5.bias"], 5),
            batch=BATCH,
            dropout=0.2,
            coder="huffman",
        ),
        "ans + penalty": Recipe(
            density={"0": 0.7, "2": 0.199, "5": 0.0113, "7": 0.1},
            structure={"5": 0.5},
            batch=64,
            warmup=0.05,
            bits={"0": 4, "2": 3, "5": 3, "7": 4, "5.bias": 4},
            share_lr=5e-4,
            distill_weight=0.4,
            dropout=0.05,
            penalty=0.01,
            half=True,
        ),
    },
}
EPOCHS = {  # dense first; then retraining while pruning; then training of shared values
    "lenet300": (8.0, 32.0, 2.0),
    "lenet5": (2.0, 32.0, 4.0),
}


def run_seed(
    name: str, seed: int, data: fashion_mnist.Data, soft: Tensor, scale: float
) -> dict[str, Any] | None:
    """All recipes of one model and one seed; None if dense training diverges."""
    epochs = [scale * e for e in EPOCHS[name]]
    model = models.build(name, seed).to(memory_format=torch.channels_last)
    train(model, data, sgd(model, LR[name]), epochs=epochs[0], seed=seed, **TRAINING)
    if not all(p.isfinite().all() for p in model.parameters()):
        print(f"{name} seed {seed}: dense training diverged, left out", flush=True)
        return None
    test = (data.test_images, data.test_labels)
    trained = accuracy(model, *test)
    every = {
        "lr": LR[name],
        **SGD,
        "prune_epochs": epochs[1],
        "share_epochs": epochs[2],
        "bf16": TRAINING["bf16"],
    }
    recipes = {label: replace(recipe, **every) for label, recipe in RECIPES[name].items()}
    arms: dict[str, dict[str, Any]] = {
        "baseline": {},
        "taught baseline": {"teacher": soft, **SOFT, "dropout": 0.1},
    }
    taught = {f"{label}, taught": replace(r, **soft_of(r)) for label, r in recipes.items()}
    recipes = {**taught, "ans + penalty": replace(recipes["ans + penalty"], distill_weight=0.0)}
    baselines = {}
    for arm, options in arms.items():
        twin = copy.deepcopy(model)
        more = {"epochs": epochs[1] + epochs[2], "seed": seed, **TRAINING, **options}
        train(twin, data, sgd(twin, LR[name]), **more)
        baselines[arm] = accuracy(twin, *test)
    result: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "trained": trained,
        **baselines,
        "runs": {},
    }
    print({k: v for k, v in result.items() if k != "runs"}, flush=True)
    for label, recipe in recipes.items():
        print(f"{name} seed {seed}: {label}", flush=True)
        result["runs"][label] = run_recipe(copy.deepcopy(model), data, recipe, soft, seed)
    return result


def soft_of(recipe: Recipe) -> dict[str, float]:
    """How soft targets enter: as the recipe says, or as in the dense baseline that is taught."""
    return {**SOFT, "distill_weight": recipe.distill_weight or SOFT["distill_weight"]}


def run_recipe(
    model: nn.Module, data: fashion_mnist.Data, recipe: Recipe, soft: Tensor, seed: int
) -> dict[str, Any]:
    """One compressed model: stages, the report, and other containers of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.dgc"
        stages, report = compress_model(
            model, data, path, recipe, seed=seed, teacher=soft, log=_flushed
        )
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
        "stage_bytes": stage_bytes(report),
        "table": str(report).splitlines(),
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


def paper_rows(results: list[dict[str, Any]]) -> list[dict[str, object]]:
    """The paper's tables 1 to 4: mean test error, and dense bytes / bytes, after each stage."""
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys(r["model"] for r in results):
        mine = [r for r in results if r["model"] == name]
        for label in mine[0]["runs"]:
            runs = [r["runs"][label] for r in mine]
            errors = [[100 - stage["accuracy"] for stage in run["stages"]] for run in runs]
            ratios = [[run["dense_bytes"] / n for n in run["stage_bytes"]] for run in runs]
            means = [round(statistics.mean(e), 2) for e in zip(*errors, strict=True)]
            sizes = [round(statistics.mean(x), 1) for x in zip(*ratios, strict=True)]
            names = ("trained", "pruned", "shared", "final")
            rows.append(
                {
                    "model": name,
                    "recipe": label,
                    **{f"{n} error %": e for n, e in zip(names, means, strict=True)},
                    **dict(zip(("P", "P+Q", "P+Q+coding"), sizes, strict=True)),
                }
            )
    return rows


def stage_bytes(report: dgc.model.Report) -> tuple[int, int, int]:
    """Bytes of the final weights pruned with 32-bit values, with codes of fixed width, and coded."""
    pruned = sum(row.pruned_bytes for row in report.rows)
    shared = sum(row.shared_bytes for row in report.rows)
    return report.header_bytes + pruned, report.header_bytes + shared, report.file_bytes


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
                    "taught %": _mean(r.get("taught baseline") for r in mine),
                    "compressed %": round(statistics.mean(r["accuracy_loaded"] for r in runs), 2),
                    "change": round(statistics.mean(change), 2),
                    "change by seed": " ".join(f"{c:+.2f}" for c in change),
                    "bytes": round(statistics.mean(r["file_bytes"] for r in runs)),
                    "ratio": round(statistics.mean(r["compression_ratio"] for r in runs), 1),
                }
            )
    return rows


def _mean(values: Iterable[float | None]) -> float | str:
    known = [value for value in values if value is not None]
    return round(statistics.mean(known), 2) if known else ""


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


def _others(out: str | None, now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the result file holds of other models and seeds, from earlier or from beside this run."""
    path = harness.RESULTS / f"{out}.json"
    if out is None or not path.exists():
        return []
    mine = {(r["model"], r["seed"]) for r in now}
    return [r for r in json.loads(path.read_text())["seeds"] if (r["model"], r["seed"]) not in mine]


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
    soft = teacher.targets(data)
    mine: list[dict[str, Any]] = []
    tables: dict[str, Any] = {}
    for name in options.models:
        for seed in options.seeds:
            done = run_seed(name, seed, data, soft, options.scale)
            if done is None:
                continue
            mine.append(done)
            results = sorted(
                _others(options.out, mine) + mine, key=lambda r: (r["model"], r["seed"])
            )
            tables = {
                "summary": summary(results),
                "stages": paper_rows(results),
                "containers": container_rows(results),
            }
            if options.out:  # after each seed: hours of work survive an interruption
                harness.save(options.out, {**tables, "epochs": EPOCHS, "seeds": results})
    print(*(harness.table(rows) for rows in tables.values()), sep="\n\n")


if __name__ == "__main__":
    main()
