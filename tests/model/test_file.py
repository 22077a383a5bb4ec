"""The file: round trips, what is refused, golden bytes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dgc.core import entropy
from dgc.errors import ConfigError, StateError
from dgc.model import (
    export,
    file,
    inspect,
    load,
    prune,
    read_state,
    report,
    save,
    save_state,
    share,
)
from dgc.model import layer as layer_module
from dgc.model.constrain import constrained
from dgc.model.layer import Decoder, Layer, encode_layers
from tests.model.network import CODERS, Net, net


def same_logits(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


STAGES: dict[str, Callable[[Net], Net]] = {
    "dense": lambda m: m,
    "pruned": lambda m: prune(m, 0.2),
    "shared": lambda m: share(m, 4),
    "pruned and shared": lambda m: share(prune(m, 0.2), 3),
    "penalised": lambda m: share(prune(m, 0.2), 5, penalty=0.02),
    "one value": lambda m: share(prune(m, 0.02), 1, penalty=0.5),
    "8 bits": lambda m: share(m, 8),
    "some layers": lambda m: share(prune(m, {"fc1": 0.05}), {"fc1": 3, "conv": 2}),
}


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_fresh_model_gives_the_same_logits(tmp_path: Path, stage: str, coder: str) -> None:
    model = STAGES[stage](net())
    report = save(model, tmp_path / "m.dgc", coder=coder)
    twin = load(net(9), tmp_path / "m.dgc")
    assert same_logits(model, twin)
    assert report.file_bytes == (tmp_path / "m.dgc").stat().st_size
    assert sum(row.file_bytes for row in report.rows) + report.header_bytes == report.file_bytes
    again, _ = inspect(tmp_path / "m.dgc")
    assert {r.name: r for r in again.rows} == {r.name: r for r in report.rows}
    assert str(report.file_bytes) in str(report).splitlines()[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("coder", CODERS)
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype, coder: str) -> None:
    model = share(prune(net().to(dtype), 0.3), {"fc1": 4})
    save(model, tmp_path / "m.dgc", coder=coder)
    twin = load(net(9).to(dtype), tmp_path / "m.dgc")
    for name, value in file.plain_state(model).items():
        assert torch.equal(value, twin.state_dict()[name]), name


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.floats(0, 1),
    st.sampled_from(CODERS),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_any_layer_round_trips(
    bits: int, shape: list[int], density: float, coder: str, literal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    if literal:
        codes = kept.to(torch.uint8)
        layer = Layer(codes, torch.randn(int(kept.sum()), generator=generator), literal=True)
    else:
        codes = torch.randint(1, 2**bits + 1, shape, generator=generator, dtype=torch.uint8) * kept
        layer = Layer(codes, torch.randn(2**bits, generator=generator))
    records = encode_layers([layer] * 3, coder)
    decoder = Decoder()
    for record in records:
        found = decoder.layer(record)
        assert torch.equal(found.codes, layer.codes)
        assert torch.equal(found.levels, layer.levels)
        assert torch.equal(found.weight(), layer.weight())


@pytest.mark.parametrize("coder", CODERS)
def test_a_layer_of_zeros_beside_another_can_be_read(coder: str) -> None:
    codes = (torch.arange(400) % 7 == 0).to(torch.uint8).view(20, 20)
    layers = [Layer(codes, torch.ones(1)), Layer(torch.zeros_like(codes[:2, :3]), torch.ones(1))]
    decoder = Decoder()
    for layer, record in zip(layers, encode_layers(layers, coder), strict=True):
        assert torch.equal(decoder.layer(record).codes, layer.codes)


@pytest.mark.parametrize("literal", [False, True])
def test_rows_and_columns_that_keep_little_make_a_layer_smaller(literal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(60, 1, generator=generator) ** 4 * torch.rand(1, 80, generator=generator)
    kept = torch.rand(60, 80, generator=generator) < shares
    levels = torch.randn(int(kept.sum()) if literal else 1, generator=generator)
    layer = Layer(kept.to(torch.uint8).view(60, 20, 4), levels, literal=literal)
    scattered = layer.codes.view(-1)[torch.randperm(4800, generator=generator)].view(60, 20, 4)
    (record,) = encode_layers([layer], "ans")
    (plain,) = encode_layers([Layer(scattered, levels, literal=literal)], "ans")
    row, bits = report.layer_row("fc", layer, record), entropy.entropy_bits
    assert len(record) < len(plain) - 30
    assert row.index_bits * kept.sum() < bits([int((~kept).sum()), int(kept.sum())]) - 8 * 30
    assert torch.equal(Decoder().layer(record).weight(), layer.weight())
    assert torch.equal(Decoder().layer(plain).codes, scattered)


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (900, 1, 1)])
def test_single_rows_and_columns_have_no_blocks(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(layer_module, "best_blocks")
    codes = (torch.arange(900) % 7 == 0).to(torch.uint8).view(shape)
    (record,) = encode_layers([Layer(codes, torch.ones(1))], "ans")
    assert torch.equal(Decoder().layer(record).codes, codes)


def test_small_layers_share_a_table() -> None:
    codes = (torch.arange(400) % 7 == 0).to(torch.uint8).view(20, 20)
    layers = [Layer(codes, torch.ones(1)), Layer(codes.t().contiguous(), torch.ones(1))]
    first, second = encode_layers(layers, "ans")
    assert len(second) < len(first)


def test_bytes_of_fixed_gaps_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = (torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.05).to(torch.uint8)
    expected = 600 * 4
    runs = [len(run) for run in "".join(map(str, codes.flatten().tolist())).split("1")[:-1]]
    for bits in range(1, 17):
        expected = min(expected, (len(runs) + sum(n // 2**bits for n in runs)) * (4 + bits))
    for chunk in (7, 1000):
        monkeypatch.setattr(report, "CHUNK", chunk)
        assert report._fixed_bytes(codes, 4, 600 - len(runs)) == -(-expected // 8)


def test_any_safetensors_reader_lists_the_file(tmp_path: Path) -> None:
    save(share(prune(net(), 0.2), 3), tmp_path / "m.dgc")
    with safe_open(tmp_path / "m.dgc", "pt") as opened:
        names = set(opened.keys())
        assert {"fc1.weight.dgc", "fc1.bias", "norm.num_batches_tracked"} <= names
        assert torch.equal(opened.get_tensor("fc1.bias"), net().fc1.bias)
        assert opened.metadata()["dgc"] == "1"


def test_half_rounds_to_sixteen_bits_and_no_more(tmp_path: Path) -> None:
    model = share(prune(net(), 0.2), 3)
    full = save(model, tmp_path / "full.dgc").file_bytes
    assert save(model, tmp_path / "half.dgc", half=True).file_bytes < full
    state = load(net(9), tmp_path / "half.dgc").state_dict()
    for name, value in file.plain_state(model).items():
        expected = value.half().float() if value.is_floating_point() else value
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], expected), name


def test_load_can_go_on_constraining(tmp_path: Path) -> None:
    model = share(prune(net(), {"fc1": 0.2}), {"fc1": 3})
    prune(model, {"out": 0.5})
    save(model, tmp_path / "m.dgc")
    twin = load(net(9), tmp_path / "m.dgc", constrain=True)
    before = twin.fc1.weight.detach().clone()
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01, weight_decay=0.1)
    twin(torch.randn(4, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    for layer in ("fc1", "out"):
        zero = model.get_parameter(f"{layer}.weight") == 0
        assert bool((twin.get_parameter(f"{layer}.weight")[zero] == 0).all())
    assert twin.fc1.weight.unique().numel() <= 8
    assert not torch.equal(twin.fc1.weight, before)


def test_only_weights_are_constrained_by_a_file(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten())

    save(prune(make(), 0.5), tmp_path / "m.dgc")
    assert {"1.running_mean", "1.weight"} <= inspect(tmp_path / "m.dgc")[1].keys()
    twin = load(make(), tmp_path / "m.dgc", constrain=True)
    assert [c.buffer_name for _, c in constrained(twin)] == ["weight_mask"]


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    save(net(), tmp_path / "m.dgc")
    with torch.device("meta"):
        model = net()
    with pytest.raises(ConfigError, match="to_empty"):
        load(model, tmp_path / "m.dgc")


class Versioned(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        raise AssertionError("never in a file")


def test_a_model_with_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    save(nn.Linear(4, 4), tmp_path / "m.dgc")
    model = Versioned(4, 4)
    before = model.weight.detach().clone()
    for use in (save, load):
        with pytest.raises(ConfigError, match="'_extra_state' is dict: a file holds tensors"):
            use(model, tmp_path / "m.dgc")
    assert torch.equal(model.weight, before)


def test_half_leaves_levels_that_it_would_make_zero(tmp_path: Path) -> None:
    small = torch.tensor([0.0, 1e-9, 1.0]).repeat_interleave(100).view(20, 15)
    save_state({"w": small}, tmp_path / "m.dgc", half=True)
    assert torch.equal(file.read_state(tmp_path / "m.dgc")["w"], small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_weight_that_is_no_number_is_kept_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    weight = torch.zeros(200, dtype=dtype)
    weight[7] = -torch.inf
    weight.view(bits)[7] += 1  # a NaN with its sign and a payload
    save_state({"w": weight}, tmp_path / "m.dgc")
    found = file.read_state(tmp_path / "m.dgc")["w"]
    assert torch.equal(found.view(bits), weight.view(bits))


def test_half_leaves_sixteen_bits_as_they_are(tmp_path: Path) -> None:
    state = {"w": (torch.randint(1, 5, (40, 40)) * 1e-7).to(torch.bfloat16)}
    save_state(state, tmp_path / "m.dgc", half=True)
    assert torch.equal(read_state(tmp_path / "m.dgc")["w"], state["w"])


def test_load_lifts_the_constraints_of_the_model_it_fills(tmp_path: Path) -> None:
    model = prune(net(0), 0.5)
    save(model, tmp_path / "m.dgc")
    twin = load(share(prune(net(1), 0.1), 2), tmp_path / "m.dgc")
    assert same_logits(model, twin)


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    save(share(net(), 3), tmp_path / "m.dgc")
    other = Net(hidden=41)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"'fc1.weight' is \(40, 128\).*\(41, 128\)"):
        load(other, tmp_path / "m.dgc")
    with pytest.raises(StateError, match="in the file only"):
        load(nn.Linear(3, 3), tmp_path / "m.dgc")
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())


def test_export_is_plain_safetensors(tmp_path: Path) -> None:
    model = share(prune(net(), 0.2), 3)
    save(model, tmp_path / "m.dgc")
    export(tmp_path / "m.dgc", tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    twin = net(9)
    twin.load_state_dict(plain)
    assert same_logits(model, twin)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="complex64"):
        save_state({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "m.dgc")
    for value in (torch.ones([1] * 17), torch.zeros([1] * 16 + [100])):
        with pytest.raises(ConfigError, match="17 dimensions: at most 16"):
            save_state({"a": value}, tmp_path / "m.dgc")
    with pytest.raises(ConfigError, match="cannot be saved"):
        save_state({"a": torch.ones(1 << 30, 1 << 18, 0)}, tmp_path / "m.dgc")
    with pytest.raises(ConfigError, match=r"\.dgc"):
        save_state({"a.dgc": torch.ones(2)}, tmp_path / "m.dgc")
    with pytest.raises(ConfigError, match="'ans'"):
        save_state({"a": torch.ones(2)}, tmp_path / "m.dgc", coder="zip")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((9, 9), float("nan")),
        torch.tensor([0.0, float("inf"), float("nan"), -0.5] * 30).view(10, 12),
        torch.tensor([0.3, 0.1 + 0.2, 1e308, 1.7e308], dtype=torch.float64).repeat(30),
        torch.zeros(20, 20),
        torch.zeros(0, 3),
        torch.tensor(3),
        torch.zeros(100, 2, dtype=torch.bool),
    ],
)
@pytest.mark.parametrize("coder", CODERS)
def test_odd_tensors(tmp_path: Path, tensor: Tensor, coder: str) -> None:
    save_state({"odd": tensor}, tmp_path / "m.dgc", coder=coder)
    found = read_state(tmp_path / "m.dgc")["odd"]
    assert torch.equal(found.nan_to_num(7.0), tensor.nan_to_num(7.0))
    assert found.shape == tensor.shape
    assert found.dtype == tensor.dtype


# --- golden bytes ------------------------------------------------------------------------------


def golden_state() -> dict[str, Tensor]:
    weight = torch.zeros(8, 12)
    weight.view(-1)[::5] = 0.5
    weight.view(-1)[3::17] = -2.0
    return {"fc.weight": weight, "fc.bias": torch.tensor([1.0, -1.0])}


GOLDEN_RECORD = {
    "ans": "010002080c19020000003f000000c0000221120610fa15d69ee6ba87b3d482d36a6a424a01",
    "huffman": "020002080c19020000003f000000c003190004333301069a8171e09cd40001110444442200",
}


GOLDEN_BLOCKS = (
    "010402283242020000003f000000c00002001b130c287f6500c735bbec525e03001c12190105190e"
    "0000006900960b3e890d1fff7c1a916dfc9b5d6d021c"
)


@pytest.mark.parametrize("coder", CODERS)
def test_golden_bytes(tmp_path: Path, coder: str) -> None:
    save_state(golden_state(), tmp_path / "m.dgc", coder=coder)
    raw = (tmp_path / "m.dgc").read_bytes()
    record = bytes.fromhex(GOLDEN_RECORD[coder])
    assert raw.endswith(torch.tensor([1.0, -1.0]).numpy().tobytes() + record)
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert raw[8:].startswith(b'{"__metadata__":{"dgc":"1","hash":"')
    assert header.pop("__metadata__").keys() == {"dgc", "hash"}
    assert header == {
        "fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "fc.weight.dgc": {
            "dtype": "U8",
            "shape": [len(record)],
            "data_offsets": [8, 8 + len(record)],
        },
    }
    assert torch.equal(read_state(tmp_path / "m.dgc")["fc.weight"], golden_state()["fc.weight"])


def test_golden_bytes_of_positions_by_blocks() -> None:
    codes = torch.zeros(40, 50, dtype=torch.uint8)
    codes[::9, ::4] = 1
    codes[::18, ::8] = 2
    codes[7, 3] = 1
    layer = Layer(codes, torch.tensor([0.5, -2.0]))
    (record,) = encode_layers([layer], "ans")
    assert record.hex() == GOLDEN_BLOCKS
    assert torch.equal(Decoder().layer(record).codes, codes)
