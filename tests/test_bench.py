"""`dgc bench`: its table on ranks as threads and as processes."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dgc
from dgc.bench import Cost, bench, break_even_bytes, sizes_of, verdict
from dgc.cli import main
from dgc.errors import ConfigError
from tests.launching import torchrun
from tests.threads import run_ranks


def test_sizes_of_a_file_a_function_and_a_number(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(5)}, path)
    assert sizes_of(str(path)) == {"a": 6, "b": 5}
    assert sizes_of("tests.workers:Toy") == {
        "a_weight": 35,
        "a_bias": 7,
        "b_weight": 21,
        "scale": 1,
    }
    assert sizes_of("12") == {"parameter": 12}


@pytest.mark.parametrize(
    "name", ["", "0", "nowhere:model", "tests.workers", "tests.workers:no", "tests.workers:train"]
)
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="gives no model"):
        sizes_of(name)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "junk.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        sizes_of(str(path))


def test_a_function_that_returns_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="returned a dict"):
        sizes_of("builtins:dict")


def test_the_table_counts_the_bytes_of_training() -> None:
    config = dgc.DGC(density=0.01, min_selected=1, bucket_bytes=100)

    def body(comm: object) -> str:
        return bench("tests.workers:Toy", config, comm, torch.device("cpu"), 1)  # type: ignore[arg-type]

    one, two = run_ranks(2, body)
    assert one == two
    lines = one.splitlines()
    assert "all 2 buckets, one after another:" in lines
    dense, half, compressed = (line.split() for line in lines[-6:-3])
    # 64 elements and a flag for each of the 4 parameters
    assert dense[:4] == ["dense", "fp32", "64", str(4 * 68)]
    assert half[:4] == ["dense", "fp16", "64", str(2 * 68)]
    assert compressed[:5] == ["dgc", "1.000%", "4", "bit", "64"]


def test_break_even_is_where_both_formulas_agree() -> None:
    dense, compressed = Cost(1000, 4000, 0.001, 9.9), Cost(1000, 100, 0.003, 9.9)
    for ranks in (2, 5):
        speed = break_even_bytes(dense, compressed, ranks)
        ring = dense.code_seconds + 2 * (ranks - 1) / ranks * 4000 / speed
        gather = compressed.code_seconds + (ranks - 1) * 100 / speed
        assert ring == pytest.approx(gather)


def test_the_verdict_says_when_it_never_pays() -> None:
    dense, large = Cost(10, 40, 0.1, 1.0), Cost(10, 90, 0.1, 1.0)
    assert "no link" in verdict([dense, dense, large], 2)
    assert "any link" in verdict([dense, dense, large._replace(payload_bytes=1)], 2)
    slow = large._replace(payload_bytes=1, code_seconds=0.5)
    assert re.search(r"links below \d", verdict([dense, dense, slow], 2))


def test_one_rank_has_nothing_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (([], "start several"), (["--repeats", "0"], "repeats is 0")):
        with pytest.raises(SystemExit, match="1"):
            main(["bench", "10", *options])
        assert words in capsys.readouterr().err


def test_the_command_on_real_ranks(tmp_path: Path) -> None:
    """As a user starts it, on a model of the folder that it is started in."""
    (tmp_path / "mine.py").write_text("import torch\nnet = lambda: torch.nn.Linear(200, 250)\n")
    options = ["bench", "mine:net", "--repeats", "1", "--bucket-mib", "0.1"]
    done = torchrun(2, "--no-python", "dgc", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dense fp32 ") == 3  # a bucket, the sum, the verdict
    assert "2 ranks" in done.stdout
