"""Damaged files, and hostile ones with a right hash: refused, within bounds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgc.errors import FileError
from dgc.model import (
    container,
    file,
    prune,
    save,
    share,
)
from dgc.model.layer import Decoder, Layer, encode_layers
from tests.model.network import CODERS, net


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    found = {}
    for coder in CODERS:
        save(share(prune(net(), 0.2), 3), folder / coder, coder=coder)
        found[coder] = (folder / coder).read_bytes()
    save(prune(net(), 0.2), folder / "literal")
    model = net()
    with torch.no_grad():
        model.fc1.weight[5:] *= 0.01
        model.fc1.weight[:, 9:] *= 0.01
    save(share(prune(model, 0.2), 3), folder / "blocks")
    opened = file.parse((folder / "blocks").read_bytes())
    assert opened.heads["fc1.weight"].blocks
    return found | {name: (folder / name).read_bytes() for name in ("literal", "blocks")}


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_change_is_noticed(good: dict[str, bytes], data: st.DataObject) -> None:
    raw = good[data.draw(st.sampled_from(sorted(good)))]
    at = data.draw(st.integers(0, len(raw) - 1))
    change = data.draw(st.integers(1, 255))
    with pytest.raises(FileError):
        decode(raw[:at] + bytes([raw[at] ^ change]) + raw[at + 1 :])
    with pytest.raises(FileError):
        decode(raw[:at])
    with pytest.raises(FileError):
        decode(raw + bytes([change]))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(FileError):
        decode(raw)


def decode(raw: bytes) -> dict[str, Tensor]:
    opened = file.parse(raw)
    file.check_size(opened)
    return opened.decode()[0]


def sealed(raw: bytes) -> bytes:
    """The same file with the hash that belongs to it: damage that no checksum shows."""
    start = container._HASH_AT
    return raw[:start] + container._digest(raw) + raw[start + container._HASH_CHARS :]


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_a_sealed_change_gives_a_file_error_or_tensors_of_the_declared_size(
    good: dict[str, bytes], data: st.DataObject
) -> None:
    raw = good[data.draw(st.sampled_from(sorted(good)))]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8 + int.from_bytes(raw[:8], "little"), len(raw) - 1))
        raw = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    try:
        state = decode(sealed(raw))
    except FileError:
        return
    shapes = file.parse(sealed(raw)).shapes()
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == shapes


def rebuilt(raw: bytes, change: Callable[[dict[str, object]], object], padding: int = 0) -> bytes:
    """The file with its header changed as JSON, and sealed."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    replaced = change(header)
    text = json.dumps(header if replaced is None else replaced, separators=(",", ":")).encode()
    text += b" " * ((padding - len(text)) % 8)
    return sealed(len(text).to_bytes(8, "little") + text + raw[8 + size :])


HOSTILE_HEADERS: dict[str, Callable[[dict[str, object]], object]] = {
    "unknown dtype": lambda h: h["fc1.bias"].update(dtype="F8"),
    "dtype that is a list": lambda h: h["fc1.bias"].update(dtype=["F32"]),
    "shape of another size": lambda h: h["fc1.bias"].update(shape=[1 << 40]),
    "negative shape": lambda h: h["fc1.bias"].update(shape=[-40]),
    "shape that is no list": lambda h: h["fc1.bias"].update(shape=40),
    "shape of floats": lambda h: h["fc1.bias"].update(shape=[40.0]),
    "shape of booleans": lambda h: h["fc1.bias"].update(shape=[True]),
    "offsets swapped": lambda h: h["fc1.bias"]["data_offsets"].reverse(),
    "offsets overlap": lambda h: h["fc1.bias"].update(data_offsets=[0, 160]),
    "offset missing": lambda h: h["fc1.bias"].update(data_offsets=[0]),
    "an extra field": lambda h: h["fc1.bias"].update(run="me"),
    "an entry that is no object": lambda h: h.update({"fc1.bias": 3}),
    "entry missing": lambda h: h.pop("fc1.bias") and None,
    "metadata that are no strings": lambda h: h["__metadata__"].update(tied={"a": "b"}),
    "tied to nothing": lambda h: h["__metadata__"].update(tied='{"a":"b"}'),
    "tied over a tensor": lambda h: h["__metadata__"].update(tied='{"fc1.bias":"fc2.bias"}'),
    "tied is no object": lambda h: h["__metadata__"].update(tied="[1]"),
    "tied is not JSON": lambda h: h["__metadata__"].update(tied="[" * 100_000),
    "unknown widening": lambda h: h["__metadata__"].update(widen="F64"),
    "a record of another dtype": lambda h: h["fc1.weight.dgc"].update(dtype="BOOL"),
    "a record in two dimensions": lambda h: h["fc1.weight.dgc"]["shape"].append(1),
    "tied name that is no Unicode": lambda h: h["__metadata__"].update(
        tied='{"a\\ud800":"fc1.bias"}'
    ),
    "tied name of the metadata": lambda h: h["__metadata__"].update(
        tied='{"__metadata__":"fc1.bias"}'
    ),
    "name that is no Unicode": lambda h: h.update({"a\ud800": h.pop("fc1.bias")}),
    "tied name of a record": lambda h: h["__metadata__"].update(tied='{"a.dgc":"fc1.bias"}'),
    "a record named as the metadata": lambda h: h.update(
        {"__metadata__.dgc": h.pop("fc1.weight.dgc")}
    ),
    "a record twice": lambda h: h.update({"fc1.weight": {**h["fc1.bias"], "shape": [0]}}),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_headers_with_a_right_hash(good: dict[str, bytes], case: str) -> None:
    with pytest.raises(FileError):
        decode(rebuilt(good["ans"], HOSTILE_HEADERS[case]))
    decode(rebuilt(good["ans"], lambda header: None))


@pytest.mark.parametrize("padding", range(1, 8))
def test_a_header_that_leaves_tensors_unaligned(good: dict[str, bytes], padding: int) -> None:
    with pytest.raises(FileError, match="not aligned"):
        decode(rebuilt(good["ans"], lambda header: None, padding))


def test_entries_are_sorted_by_width() -> None:
    raw = container.pack(
        {"a": container.Entry("I16", (4,), bytes(8)), "b": container.Entry("F16", (4,), bytes(8))},
        {},
    )
    container.unpack(raw)
    with pytest.raises(FileError, match="not aligned"):
        container.unpack(
            rebuilt(raw, lambda h: h["b"].update(dtype="F32", shape=[2]))  # behind 16 bits
        )


def test_hostile_header_texts_with_a_right_hash(good: dict[str, bytes]) -> None:
    start = container._START + b"0" * 32
    for text in (
        start,
        start + b'"}}garbage',
        start + b'"},"a":' + b"[" * 100_000,
        start + b'"},"a":{},"a":{}}',
        start + b'"},"\xff":{}}',
        start + b'","a":"\xed\xa0\x80"}}     ',  # a surrogate's bytes
        start + b'"}}' + b" " * 13,
        start + b'"}}\n    ',
        start + b'"},"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
    ):
        with pytest.raises(FileError):
            decode(sealed(len(text).to_bytes(8, "little") + text))
    for size in (0, 1 << 20, (1 << 64) - 1):
        with pytest.raises(FileError):
            decode(sealed(size.to_bytes(8, "little") + good["ans"][8:]))


def file_of(record: bytes) -> bytes:
    return container.pack({"w.dgc": container.Entry("U8", (len(record),), record)}, {})


BLOCKS = b"\x01\x04\x02\x08\x08\x05\x01\x00\x00\x80\x3f\x00\x01\x00\x01\x00"
"""A record by blocks, eight by eight, five non-zeros of the only level, up to the positions."""


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_record_with_a_right_hash(tail: bytes) -> None:
    for start in (
        b"",
        b"\x01\x00\x02\x08\x08",
        b"\x02\x00\x02\x08\x08",
        b"\x01\x01\x02\x08\x08",
        BLOCKS,
    ):
        try:
            state = decode(file_of(start + tail))
        except FileError:
            continue
        assert tuple(state["w"].shape) == file.parse(file_of(start + tail)).shapes()["w"][0]


LEVEL = b"\x00\x00\x80\x3f"
HOSTILE_RECORDS = {
    "a level of zero": b"\x01\x00\x01\x02\x01\x01" + bytes(4) + b"\x00\x01\x00\x08\x00",
    "a level that is no number": b"\x01\x00\x01\x02\x02\x01"
    + b"\xff" * 4
    + b"\x00\x01\x00\x01\x00",
    "a literal of zero": b"\x01\x01\x01\x02\x02\x00\x01\x00\x01\x00" + LEVEL + bytes(4),
    "literals in 16 bits": b"\x01\x03\x01\x02\x02\x00\x01\x00\x01\x00\x00\x3c\x00\x3c",
    "levels in 16 bits of 16": b"\x11\x02\x01\x02\x02\x01\x00\x3c\x00\x01\x00\x01\x00",
    "zeros after the last weight": b"\x02\x01\x01\x02\x01\x01\x02\x00\x01\x11\x01\x40\x00\x00\x00\x00"
    + LEVEL,
    "a table with bits left over": b"\x02\x01\x01\x01\x01\x01\x01\x00\x00\x11\x01\x00\x00\x00\x00\x00"
    + LEVEL,
}
"""Of one dimension, of 1 or 2 elements; with the table of one symbol and no code where that will do."""


@pytest.mark.parametrize("case", HOSTILE_RECORDS)
def test_hostile_records_with_a_right_hash(case: str) -> None:
    with pytest.raises(FileError):
        decode(file_of(HOSTILE_RECORDS[case]))


def test_truth_is_zero_or_one() -> None:
    for byte in range(3):
        raw = container.pack({"b": container.Entry("BOOL", (2,), bytes([0, byte]))}, {})
        if byte < 2:
            assert decode(raw)["b"].tolist() == [False, byte == 1]
            continue
        with pytest.raises(FileError, match="truth"):
            decode(raw)


def test_a_small_file_cannot_claim_much_memory() -> None:
    huge = b"\x01\x00\x02" + b"\xff\xff\xff\x7f" * 2  # 2^28 - 1 squared elements
    with pytest.raises(FileError, match="a record of shape"):
        decode(file_of(huge + b"\x00" * 20))
    zeros = b"\x01\x00\x02" + b"\x80\x80\x40" * 2 + b"\x00\x00\x00\x00\x01\x00"
    with pytest.raises(FileError, match=r"decodes to 4398046511104 bytes.*max_bytes"):
        decode(file_of(zeros))


@pytest.mark.parametrize("shape", [(1 << 47, 1 << 47, 0), (0, 1 << 24, 1 << 24)])
def test_an_empty_shape_cannot_span_more_than_memory(shape: tuple[int, ...]) -> None:
    with pytest.raises(FileError, match="too large for any memory"):
        decode(container.pack({"w": container.Entry("F32", shape, b"")}, {}))


def test_tied_names_count_each(tmp_path: Path) -> None:
    zeros = torch.zeros(1024, 1024)
    file.save_state(dict.fromkeys(map(str, range(200)), zeros), tmp_path / "m.dgc")
    assert (tmp_path / "m.dgc").stat().st_size < 4096
    with pytest.raises(FileError, match=f"decodes to {200 << 22} bytes"):
        file.export(tmp_path / "m.dgc", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_that_refer_to_no_table_are_refused() -> None:
    layer = Layer((torch.arange(100) % 3).to(torch.uint8).view(10, 10), torch.tensor([1.0, 2.0]))
    first, second = encode_layers([layer, layer], "ans")
    assert first != second
    assert torch.equal(Decoder().layer(first).codes, layer.codes)
    with pytest.raises(FileError, match="not there"):
        Decoder().layer(second)
    decoder = Decoder()
    decoder.layer(encode_layers([layer], "huffman")[0])
    with pytest.raises(FileError, match="another coder"):
        decoder.layer(second)
