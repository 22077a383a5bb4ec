"""The command line: what it writes, what it says, how it fails."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgc.cli import main
from dgc.model import picture, progress, prune, read_state, save_state, share
from dgc.model.file import plain_state


@pytest.fixture
def state(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "fc.weight": torch.randn(64, 100),
        "fc.bias": torch.randn(64),
        "norm.steps": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


def test_compress_inspect_export(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plain = tmp_path / "out.dgc", tmp_path / "plain.safetensors"
    assert main(["compress", str(state), str(out), "--density", "0.1", "--bits", "3"]) == 0
    table = capsys.readouterr().out
    assert f"{out.stat().st_size}" in table.splitlines()[-1]
    assert main(["inspect", str(out)]) == 0
    inspected = capsys.readouterr().out
    assert sorted(inspected.splitlines()) == sorted(table.splitlines())
    assert main(["export", str(out), str(plain)]) == 0
    before, after = load_file(state), load_file(plain)
    assert before.keys() == after.keys()
    assert torch.equal(after["fc.bias"], before["fc.bias"])
    assert int(after["norm.steps"]) == 7
    assert int(after["fc.weight"].count_nonzero()) == 640
    assert after["fc.weight"].unique().numel() == 8
    kept = after["fc.weight"] != 0
    assert before["fc.weight"][kept].abs().min() >= before["fc.weight"][~kept].abs().max()


@pytest.mark.parametrize(
    "options", [["--coder", "huffman"], ["--half"], ["--penalty", "0.05"], ["--bits", "2"]]
)
def test_options_change_the_file(state: Path, tmp_path: Path, options: list[str]) -> None:
    plain, other = tmp_path / "plain.dgc", tmp_path / "other.dgc"
    assert main(["compress", str(state), str(plain)]) == 0
    assert main(["compress", str(state), str(other), *options]) == 0
    assert plain.read_bytes() != other.read_bytes()


def test_excluded_tensors_are_left_as_they_are(tmp_path: Path) -> None:
    state = {"fc.weight": torch.randn(8, 10), "rotary.cos": torch.randn(8, 10)}
    save_file(state, tmp_path / "state")
    out = tmp_path / "out.dgc"
    command = ["compress", str(tmp_path / "state"), str(out), "--density", "0.1"]
    assert main([*command, "--exclude", "rotary.*"]) == 0
    found = read_state(out)
    assert torch.equal(found["rotary.cos"], state["rotary.cos"])
    assert int(found["fc.weight"].count_nonzero()) == 8


def test_global_scope(state: Path, tmp_path: Path) -> None:
    command = ["compress", str(state), str(tmp_path / "out.dgc"), "--density", "0.1"]
    assert main([*command, "--scope", "global"]) == 0


def test_picture(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.dgc"
    main(["compress", str(state), str(out)])
    assert main(["inspect", str(out), "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(out), "--picture", str(tmp_path / "p.xyz")]) == 1
    assert "end it in one of" in capsys.readouterr().err


def test_names_in_a_picture_are_no_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_state({r"$\foo$.w": torch.ones(9, 9), r"a\$b$": torch.ones(3)}, tmp_path / "m.dgc")
    command = ["inspect", str(tmp_path / "m.dgc"), "--picture", str(tmp_path / "p.svg")]
    assert main(command) == 0


def test_the_state_of_a_pruned_and_shared_model(tmp_path: Path) -> None:
    model = share(prune(torch.nn.Sequential(torch.nn.Linear(20, 20)), 0.3), 3)
    model.register_buffer("own_mask", torch.ones(3, dtype=torch.bool))
    plain = plain_state(model)
    assert set(plain) == {"own_mask", "0.weight", "0.bias"}
    save_file(model.state_dict(), tmp_path / "state")
    command = ["compress", str(tmp_path / "state"), str(tmp_path / "out.dgc"), "--bits", "3"]
    assert main(command) == 0
    saved = read_state(tmp_path / "out.dgc")
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{state}"], "not a compressed model"),
        (["inspect", "{missing}"], "No such file"),
        (["compress", "{junk}", "{out}"], "not a safetensors file"),
        (["compress", "{folder}", "{out}"], "{folder} is no regular file"),
        (["compress", "{missing}", "{folder}"], "'{folder}' is a folder"),
        (["compress", "{missing}", "."], "'.' is a folder"),
        (["compress", "{missing}", "{missing}/out"], "'{missing}/out' lies in no folder"),
        (["compress", "{state}", "{out}", "--bits", "9"], "give 1 to 8"),
        (["compress", "{state}", "{out}", "--density", "0"], "give a number in (0, 1]"),
        (["compress", "{state}", "{out}", "--density", "1.5"], "give a number in (0, 1]"),
        (["compress", "{state}", "{out}", "--density", "nan"], "give a number in (0, 1]"),
        (
            ["compress", "{state}", "{out}", "--exclude", "x"],
            "no tensor is named 'x': there are ['fc.bias'",
        ),
        (["compress", "{nan}", "{out}"], "1 elements of fc.weight are not finite"),
        (["compress", "{fp8}", "{out}"], "'fc.weight' is torch.float8_e4m3fn: a file holds"),
        (["bench", "1000", "--bucket-mib", "nan"], "give a number above 0"),
    ],
)
def test_faults_are_one_line(
    state: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\xff" * 100)
    weight = torch.ones(10, 10)
    save_file({"fc.weight": weight.to(torch.float8_e4m3fn)}, tmp_path / "fp8")
    weight[3, 3] = torch.nan
    save_file({"fc.weight": weight}, tmp_path / "nan")
    names = {"state": state, "missing": tmp_path / "no", "junk": junk, "out": tmp_path / "o"}
    names |= {name: tmp_path / name for name in ("fp8", "nan")} | {"folder": tmp_path}
    assert main([a.format(**names) for a in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"dgc {arguments[0]}: ")
    assert message.format(**names) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".*"))


def test_missing_packages_are_named(
    state: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.dgc"
    main(["compress", str(state), str(out)])
    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(out), "--picture", str(tmp_path / "p.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with pytest.raises(picture.MissingPackageError, match="pip install tqdm"):
        progress.bar([1], "one", show=True)
