"""Messages read on a GPU, or as on one: the same as the host reads, whatever the bytes are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.fuzz_wire import mutate, seal
from dgc.core import Sparse, SparseBatch, kernels
from dgc.core.quantize import VALUE_BITS
from dgc.core.rice import rice_code
from dgc.core.varint import varint
from dgc.errors import ConfigError, WireError
from dgc.train import arrive, wire
from dgc.train.arrive import Expected
from dgc.train.frame import read_frame
from dgc.train.recorded import Receiver, Recorder
from dgc.train.step import Arrival
from tests.core.on_device import DEVICE

pytestmark = pytest.mark.usefixtures("device_path")
NUMELS = (40, 1, 0, 700, 129)
COUNTS = (9, 1, 0, 30, 0)
SWAPPED = (1, 40, 0, 700, 129)
fewer = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def drawn(
    seed: int,
    bits: int = 4,
    *,
    numels: Sequence[int] = NUMELS,
    counts: Sequence[int] = COUNTS,
    exponent: int = 0,
    empty: float = 0.0,
    **options: Any,
) -> Tensor:
    """A rank's message; a share `empty` of its slots holds no value."""
    generator, tensors = torch.Generator().manual_seed(seed), []
    for numel, count in zip(numels, counts, strict=True):
        indices = torch.randperm(numel, generator=generator)[:count].sort().values
        values = torch.randn(count, generator=generator) * 10.0**exponent
        hole = (torch.rand(count, generator=generator) < empty) | ~values.isfinite()
        tensors.append(Sparse(indices.masked_fill(hole, 0), values.masked_fill(hole, 0), numel))
    batch = SparseBatch.cat(tensors)
    there = batch._replace(indices=batch.indices.to(DEVICE), values=batch.values.to(DEVICE))
    size = wire.max_message_bytes(numels, counts, bits, DEVICE)
    return wire.encode_batch(there, bits, message_bytes=size, **options)[0].cpu()


def padded(messages: Sequence[Tensor]) -> Tensor:
    width = max(64, *(message.numel() for message in messages))
    rows = [torch.nn.functional.pad(each, (0, width - each.numel())) for each in messages]
    return torch.stack(rows).to(DEVICE)


def of(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def places(batch: SparseBatch) -> Tensor:
    starts = torch.tensor([0, *batch.numels[:-1]]).cumsum(0)
    return batch.indices + starts.repeat_interleave(torch.tensor(batch.counts))


def read(message: Tensor, numels: Sequence[int]) -> wire.Message | None:
    """What the host reads, None of an invalid message."""
    try:
        return wire.decode_batch(message, numels)
    except WireError:
        return None


def check(messages: Tensor, bits: int, numels: Sequence[int], slots: int) -> list[bool]:
    """Which are ok: those that the host reads too, and are of the kind; what they hold is the same."""
    from dgc.core.kernels import decode_torch

    frame = arrive.frame_of(messages, tuple(numels), Expected(bits, slots))
    assert frame is not None
    found = decode_torch.decode(messages, frame)
    ok, finite, counts = found.ok.tolist(), found.finite.tolist(), found.counts.tolist()
    used, positions, values = found.used.cpu(), found.positions.cpu(), found.values.cpu()
    low_bits = rice_code(sum(numels), slots).low_bits
    for p, message in enumerate(messages.cpu()):
        host = read(message, numels)
        if host is None:
            assert not ok[p]
            continue
        header = read_frame(message.numpy(), tuple(numels))[0]
        count = header.num_values
        kind = header.rice, header.code, header.value_bits
        alike = kind == (True, low_bits, bits) if count else header.value_bits == bits
        assert ok[p] == (alike and count <= slots)
        if ok[p]:
            assert (finite[p], tuple(used[p].tolist())) == (host.finite, host.used)
            assert counts[p] == count
            assert torch.equal(positions[p, :count], places(host.batch))
            expected = host.batch.values.view(torch.int32)
            assert torch.equal(values[p, :count].view(torch.int32), expected)
            assert not positions[p, count:].any()
            assert not values[p, count:].view(torch.int32).any()
    return ok


@st.composite
def ranks(draw: Any, bits: int) -> tuple[Tensor, list[int], int]:
    """Messages of several ranks, the numels of their tensors, and slots."""
    numels = [*draw(st.lists(st.integers(0, 200), max_size=6)), draw(st.integers(1, 2000))]
    counts = [*(draw(st.integers(0, numel)) for numel in numels[:-1]), 1]
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        used = draw(st.lists(st.booleans(), min_size=len(numels), max_size=len(numels)))
        finite = draw(st.sampled_from([True, True, True, False]))
        more = {"finite": torch.tensor(finite).to(DEVICE), "used": used}
        more["exponent"] = draw(st.integers(-40, 30))
        more["empty"] = draw(st.sampled_from([0, 0, 0.3, 1]))
        seed = draw(st.integers(0, 1 << 30))
        messages.append(drawn(seed, bits, numels=numels, counts=counts, **more))
    return padded(messages), numels, sum(counts)


@pytest.mark.parametrize("bits", VALUE_BITS)
@fewer
@given(st.data())
def test_a_gpu_reads_what_the_host_reads(bits: int, data: st.DataObject) -> None:
    messages, numels, slots = data.draw(ranks(bits))
    assert all(check(messages, bits, numels, slots))


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_mutated_messages(bits: int) -> None:
    """Half of them sealed again, so that what the checksum would hide is found too."""
    rng = np.random.default_rng(bits)
    valid = [drawn(seed, bits, used=[True] * 4 + [seed > 0], empty=seed / 9) for seed in range(3)]
    sizes = [read_frame(each.numpy(), NUMELS)[0].message_bytes for each in valid]
    cut = [bytes(each[:size].tolist()) for each, size in zip(valid, sizes, strict=True)]
    messages = [of(mutate(rng, cut[n % 3])) for n in range(25)]
    messages += [of(seal(bytes(flipped(rng, cut[n % 3])))) for n in range(25)]
    ok = check(padded([*valid, *messages]), bits, NUMELS, sum(COUNTS))
    assert all(ok[:3])
    assert not all(ok[3:])


def flipped(rng: np.random.Generator, message: bytes) -> bytearray:
    """Another bit anywhere behind the fixed part: much of that remains valid."""
    data = bytearray(message)
    data[int(rng.integers(10, len(data) - 4))] ^= 1 << int(rng.integers(0, 8))
    return data


def body(
    parameters: bytes = b"\x80\x3f\x80\x3f",
    codes: bytes = b"\0",
    unary: bytes = b"\1",
    *,
    tables: bytes = b"\x01\x05",
    bitmap: bytes = b"",
    count: bytes = b"\1",
    flags: int = 0x23,
    code: int = 0,
    after: bytes = b"",
) -> bytes:
    """One value, without low bits, of one tensor of 5 elements, 4 bits by default; sealed."""
    rest = tables + bitmap + count + parameters + codes + unary + bytes(4)
    return seal(b"DGC\x01" + bytes([flags, code]) + bytes(4) + rest) + after


VALID = {
    "four bits": (4, body()),
    "one bit": (1, body(b"\x80\x3f", flags=0x20)),
    "32 bits": (32, body(b"", b"\xff\xff\x7f\x7f", flags=0x26)),
    "zero level": (4, body(b"\x80\xbf\x80\x3f")),
    "largest level": (4, body(b"\x7f\x7f\x7f\x7f")),
    "last place": (4, body(unary=b"\x10")),
    "unused": (4, body(bitmap=b"\0", flags=0x33)),
    "no values": (4, body(b"", b"", b"", count=b"\0")),
    "no values, of a CPU": (4, body(b"", b"", b"", count=b"\0", flags=0x03)),
    "not finite": (4, body(b"", b"", b"", count=b"\0", flags=0x2B)),
    "padding": (4, body(after=bytes(9))),
    "five values": (1, body(b"\x80\x3f", b"\x1f", b"\x1f", flags=0x20, count=b"\5")),
}
INVALID = {
    "magic": (4, b"E" + body()[1:]),
    "version": (4, seal(b"DGC\2" + body()[4:])),
    "flag": (4, body(flags=0x63)),
    "width": (4, body(flags=0x27)),
    "no Rice code": (4, body(flags=0x03)),
    "checksum": (4, body()[:-1] + bytes([body()[-1] ^ 1])),
    "length": (4, body()[:6] + b"\x10" + body()[7:]),
    "length beyond": (4, body()[:6] + b"\xff\xff\xff\xff" + body()[10:]),
    "length of nothing": (4, body()[:6] + bytes(4) + body()[10:]),
    "not padding": (4, body(after=b"\0\1")),
    "not padding, far on": (4, body(after=bytes(900) + b"\1")),
    "other tables": (4, body(tables=b"\x01\x06")),
    "long tables": (4, body(tables=b"\x01\x85\0")),
    "bitmap full": (4, body(bitmap=b"\1", flags=0x33)),
    "bitmap too wide": (4, body(bitmap=b"\2", flags=0x33)),
    "long varint": (4, body(count=b"\x81\0")),
    "endless varint": (4, body(count=b"\x81\x80\x80\x80\x80\x80\1")),
    "varint that ends nowhere": (4, body(b"", b"", b"", count=b"\x80" * 5)),
    "too many values": (1, body(b"\x80\x3f", b"\x3f", b"\x3f", flags=0x20, count=b"\6")),
    "far too many": (4, body(count=varint((1 << 35) - 1))),
    "values not finite": (4, body(flags=0x2B)),
    "code without values": (4, body(b"", b"", b"", count=b"\0", code=1)),
    "body without values": (4, body(b"", b"", count=b"\0")),
    "infinite level": (4, body(b"\x80\x3f\x80\x7f")),
    "nan level": (4, body(b"\xc0\x7f\xc0\x7f")),
    "levels descend": (4, body(b"\x81\x3f\x80\x3f")),
    "zero level, levels descend": (4, body(b"\x81\xbf\x80\x3f")),
    "negative level": (4, body(b"\x80\x3f\x80\xbf")),
    "infinite one-bit level": (1, body(b"\x80\x7f", flags=0x20)),
    "zero one-bit level": (1, body(b"\0\x80", flags=0x20)),
    "infinite value": (32, body(b"", b"\0\0\x80\xff", flags=0x26)),
    "nan value": (32, body(b"", b"\1\0\x80\x7f", flags=0x26)),
    "codes' fill": (4, body(codes=b"\x10")),
    "no one bit": (4, body(unary=b"\0")),
    "two one bits": (4, body(unary=b"\3")),
    "a byte too many": (4, body(unary=b"\1\0")),
    "no quotients": (4, body(unary=b"")),
    "outside by one": (4, body(unary=b"\x20")),
    "far outside": (4, body(unary=bytes(40) + b"\x80")),
}


@pytest.mark.parametrize("bits", [1, 4, 32])
def test_hand_made_messages(bits: int) -> None:
    """All in one call; five slots, so that there are no low bits."""
    for cases, valid in ((VALID, True), (INVALID, False)):
        chosen = {name: of(data) for name, (width, data) in cases.items() if width == bits}
        messages = padded(list(chosen.values()))
        found = dict(zip(chosen, check(messages, bits, (5,), 5), strict=True))
        assert found == dict.fromkeys(chosen, valid)
        hosts = [read(message, (5,)) is not None for message in messages.cpu()]
        assert hosts == [valid] * len(hosts)


def test_low_bits() -> None:
    """Of one value in 2^48 elements all 47 are low; what fills them up must be zero."""
    numels, low = (1 << 48,), (1 << 47) - 1
    assert rice_code(numels[0], 1).low_bits == 47
    tables = b"\1" + varint(numels[0])
    for fill, unary in ((0, b"\1"), (1, b"\1"), (0, b"\2"), (0, b"\4"), (0, bytes(30) + b"\1")):
        section = (low | fill << 47).to_bytes(6, "little")
        message = body(codes=section + b"\7", unary=unary, tables=tables, code=47)
        (ok,) = check(padded([of(message)]), 4, numels, 1)
        assert ok == (fill == 0 and len(unary) == 1 and unary < b"\4")


def test_more_values_than_slots() -> None:
    """Of a rank that counts otherwise: as many slots as a program of the kernel works on, or fewer."""
    from dgc.core.kernels.decode_torch import BLOCK

    message = padded([drawn(0, numels=(3 * BLOCK,), counts=(BLOCK + 8,))])
    for slots in (BLOCK, BLOCK + 7, BLOCK + 8, BLOCK + 9):
        assert check(message, 4, (3 * BLOCK,), slots) == [slots >= BLOCK + 8]


def outcome(
    messages: Tensor, scales: list[float], expected: Expected | None
) -> tuple[Arrival | str, list[list[int]]]:
    """What arrived, or the error, and the bits of the gradients: the same again and again."""
    outcomes, receiver = [], Receiver()
    for _ in range(Recorder.unrecorded + 2):
        grads = [torch.full((numel,), 7.0, device=DEVICE) for numel in NUMELS]
        try:
            found: Arrival | str = receiver.receive_(messages, grads, scales, expected)
        except WireError as error:
            found = str(error)
        outcomes.append((found, [grad.view(torch.int32).tolist() for grad in grads]))
    assert all(each == outcomes[0] for each in outcomes)
    return outcomes[0]


def verdict(messages: Tensor, expected: Expected) -> tuple[bool, tuple[bool, ...]] | None:
    frame = arrive.frame_of(messages, NUMELS, expected)
    return None if frame is None else arrive.verdict(arrive.read(messages, frame))


UNTOUCHED = [torch.full((numel,), 7.0).view(torch.int32).tolist() for numel in NUMELS]
SCALES = [0.3, 1 / 3, 5.0, 0.7, 1e-3]


def gathered(bits: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Messages of three ranks, by what is the matter with the second one."""
    first, second, third = (drawn(seed, bits, empty=0.2) for seed in range(3))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "codes_there", lambda device: False)
        patch.setattr("tests.train.test_arrive.DEVICE", torch.device("cpu"))
        of_a_host = drawn(5, bits)
    damaged = second.clone()
    damaged[len(damaged) // 2] ^= 4
    cut = second.clone()
    cut[len(cut) // 2 :] = 0
    return {
        "nothing": [first, second, third],
        "not finite": [first, drawn(6, bits, finite=torch.tensor(False).to(DEVICE)), third],
        "unused": [drawn(7, bits, used=[False] * 5), drawn(8, bits, used=[True, *[False] * 4])],
        "made by a CPU": [first, of_a_host, third],
        "another width": [first, drawn(9, 4 if bits == 3 else 3), third],
        "another density": [first, drawn(10, bits, counts=(1, 1, 0, 1, 0)), third],
        "damaged": [first, damaged, third],
        "cut": [first, cut, third],
        "empty": [first, torch.zeros_like(second), third],
        "other tensors": [first, drawn(11, bits, numels=SWAPPED, counts=(1, 9, 0, 30, 0)), third],
    }


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_receiving_equals_the_host_path(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; after an error all gradients are as they were."""
    cases = {name: padded(each) for name, each in gathered(bits, monkeypatch).items()}
    expected, there = Expected(bits, sum(COUNTS)), {}
    for name, messages in cases.items():
        there[name] = outcome(messages, SCALES, expected)
    wrong = outcome(cases["nothing"], SCALES, Expected(8 if bits == 4 else 4, 3))
    monkeypatch.undo()
    for name, messages in cases.items():
        host = outcome(messages.cpu(), SCALES, None)
        assert there[name] == host, name
        assert name != "nothing" or wrong == host
        fails = name in ("damaged", "cut", "empty", "other tensors")
        assert isinstance(host[0], str) == fails
        assert (host[1] == UNTOUCHED) == fails


def test_messages_of_another_number_of_ranks_in_between() -> None:
    """What was recorded before is not used after."""
    several = [padded([drawn(3 * i + rank) for rank in range(3)]) for i in range(2)]
    few, often = padded([drawn(0), drawn(1)]), Recorder.unrecorded + 2
    receiver, expected = Receiver(), Expected(4, sum(COUNTS))
    for messages in (*several * often, few, *reversed(several * often)):
        found = [torch.full((numel,), 7.0, device=DEVICE) for numel in NUMELS]
        host = [torch.empty(numel) for numel in NUMELS]
        arrival = receiver.receive_(messages, found, SCALES, expected)
        wire.set_mean_(messages.cpu(), host, SCALES)
        assert arrival.finite
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, host, strict=True))


def test_what_is_not_as_expected_is_left_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, messages in gathered(4, monkeypatch).items():
        expected = name in ("nothing", "not finite", "unused")
        found = verdict(padded(messages), Expected(4, sum(COUNTS)))
        assert (found is not None) == expected, name
    valid = padded([drawn(0)])
    rows = valid[:0], valid[0], valid.int(), valid[:, :14]
    for messages, slots in (*((each, sum(COUNTS)) for each in rows), (valid, 0), (valid, 9999)):
        assert verdict(messages, Expected(4, slots)) is None


def test_messages_for_no_tensor() -> None:
    none = torch.zeros(0, device=DEVICE)
    empty = wire.encode_batch(SparseBatch(none.long(), none, (), ()), 1, message_bytes=64)[0]
    assert Receiver().receive_(empty.view(1, -1), [], [], Expected(4, 0)) == Arrival(True, ())


def test_a_gradient_that_is_not_dense_is_refused() -> None:
    messages = padded([drawn(0, numels=(100,), counts=(10,))])
    grad = torch.zeros(10, 10, device=DEVICE).t()
    with pytest.raises(ConfigError, match="contiguous float32"):
        Receiver().receive_(messages, [grad], [1.0], Expected(4, 10))


@pytest.mark.parametrize("count", [0, 1, 700, 1500])
def test_adding_equals_the_reference(count: int) -> None:
    """Slots beyond the number of values do nothing, wherever they point."""
    from dgc.core.kernels import reference

    generator = torch.Generator().manual_seed(count)
    numels, scales = (3, 0, 2000, 1, 497), [0.1, 1.0, 1 / 3, 7.0, 1e-30]
    positions = torch.randperm(2501, generator=generator)[:1500]
    values = torch.randn(2, 1500, generator=generator)
    starts = [torch.randn(numel, generator=generator) for numel in numels]
    counts = torch.tensor([count, 1500 - count])
    results = []
    for there, add in ((DEVICE, kernels.scatter_add_), ("cpu", reference.scatter_add_)):
        grads = [each.clone().to(there) for each in starts]
        runs = [positions.to(there)] * 2, list(values.to(there))
        add(grads, *runs, counts.to(there), scales)
        results.append([grad.view(torch.int32).tolist() for grad in grads])
    assert results[0] == results[1]
