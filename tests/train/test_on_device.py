"""Messages made where the values are, and the whole step with them: on a GPU, or as on one."""

import hashlib
import zlib
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dgc
from dgc.core import Sparse, SparseBatch, kernels
from dgc.core.kernels import codec_reference
from dgc.core.kernels.codec_reference import Body
from dgc.core.layout import Layout
from dgc.core.quantize import VALUE_BITS
from dgc.core.rice import rice_code
from dgc.errors import ConfigError
from dgc.train import wire
from dgc.train.bucket import Row, updates
from dgc.train.frame import read_frame
from dgc.train.memory import Memory
from dgc.train.step import message_plan, send_
from tests.core.on_device import DEVICE
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, train, wrap

pytestmark = pytest.mark.usefixtures("device_path")
GOLDEN = {
    1: "0def95f4cab45c20",
    2: "a30d644ca1b04ccc",
    3: "d781d2bd02f29e1b",
    4: "f1b026d671c69715",
    8: "69c5dbea531cc7dc",
    16: "152a31e3bc24c5e9",
    32: "ce379bb22da6829b",
}
reused = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def sent(
    batch: SparseBatch, bits: int, finite: bool = True, used: list[bool] | None = None
) -> tuple[Tensor, Tensor]:
    size = wire.max_message_bytes(batch.numels, batch.counts, bits, DEVICE)
    there = batch._replace(
        indices=batch.indices.to(DEVICE), values=batch.values.to(DEVICE, copy=True)
    )
    options: dict[str, Any] = {"message_bytes": size, "used": used}
    ok = torch.tensor(finite, device=DEVICE)
    message, values = wire.encode_batch(there, bits, finite=ok, **options)
    assert message.numel() == size
    return message.cpu(), values.cpu()


def same(found: SparseBatch, expected: SparseBatch) -> bool:
    bits = [batch.values.view(torch.int32) for batch in (found, expected)]
    indices = torch.equal(found.indices, expected.indices)
    return indices and torch.equal(*bits) and found.counts == expected.counts


@st.composite
def batches(draw: Any) -> SparseBatch:
    """Slots of which some are unfilled, values of any size."""
    tensors = []
    for numel in draw(st.lists(st.integers(1, 200), min_size=1, max_size=6)):
        chosen = sorted(draw(st.sets(st.integers(0, numel - 1), max_size=numel)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
        values = torch.randn(len(chosen), generator=generator)
        values *= 10.0 ** draw(st.integers(-40, 30))
        empty = torch.rand(len(chosen), generator=generator) < draw(st.sampled_from([0, 0, 0.3, 1]))
        indices = torch.tensor(chosen, dtype=torch.int64).masked_fill(empty, 0)
        tensors.append(Sparse(indices, values.masked_fill(empty, 0), numel))
    return SparseBatch.cat([*tensors, Sparse(torch.tensor([3]), torch.tensor([-2.0]), 10)])


@reused
@given(batches(), st.sampled_from(VALUE_BITS), st.data())
def test_the_sender_knows_what_arrives(batch: SparseBatch, bits: int, data: st.DataObject) -> None:
    used = data.draw(st.lists(st.booleans(), min_size=len(batch.counts), max_size=7))
    used = (used + [True] * 7)[: len(batch.counts)]
    message, values = sent(batch, bits, used=used)
    found = wire.decode_batch(message, batch.numels)
    filled = batch.filled()
    arrived = values[batch.values != 0]
    assert same(found.batch, filled._replace(values=arrived))
    assert (found.finite, found.used) == (True, tuple(used))
    assert torch.equal(torch.signbit(arrived), torch.signbit(filled.values))
    assert not bool(values[batch.values == 0].any())
    if bits == 32:
        assert torch.equal(arrived, filled.values)


@reused
@given(batches(), st.sampled_from(VALUE_BITS))
def test_the_reference_reads_the_same(batch: SparseBatch, bits: int) -> None:
    message, _ = sent(batch, bits)
    header, at = read_frame(message.numpy(), None)
    body = Body(*(message.numpy()[a:b] for a, b in pairwise(at)))
    ends = torch.tensor(batch.numels).cumsum(0).numpy()
    positions, values, counts, status = codec_reference.decode(
        body, header.num_values, ends, header.code, bits, rice=header.rice
    )
    read = wire.decode_batch(message).batch
    starts = torch.tensor([0, *ends[:-1].tolist()]).repeat_interleave(torch.tensor(read.counts))
    assert status is codec_reference.Status.OK
    assert positions.tolist() == (read.indices + starts).tolist()
    assert values.tobytes() == read.values.numpy().tobytes()
    assert counts.tolist() == list(read.counts)
    again, _, status = codec_reference.encode(
        read.indices.numpy(), values, counts, ends, header.code, bits, rice=True
    )
    assert status is codec_reference.Status.OK
    assert again.low.tobytes() == body.low.tobytes()
    assert again.words.tobytes() == body.words.tobytes()


def laplace(count: int, seed: int) -> Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 0.5
    return drawn.sign() * (7 - (1 - 2 * drawn.abs()).log())


def drawn(numel: int, count: int) -> SparseBatch:
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(count))
    return SparseBatch(order[:count].sort().values, laplace(count, 0), (count,), (numel,))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_no_worse_than_the_search_on_the_host(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = drawn(100_000, 1000)
    values = sent(batch, bits)[1]
    monkeypatch.undo()
    size = wire.max_message_bytes(batch.numels, batch.counts, bits)
    host = wire.encode_batch(batch, bits, message_bytes=size)[1]
    errors = [(each - batch.values).square().sum() for each in (values, host)]
    assert errors[0] <= 1.03 * errors[1]


@pytest.mark.parametrize(
    ("density", "limit"), [(0.001, 15.6), (0.0001, 19.0), (0.01, 12.3)], ids=str
)
def test_bits_a_value(density: float, limit: float) -> None:
    """Of the padded message, 4 bits a value, in 25,557,032 elements."""
    count = int(25_557_032 * density)
    assert wire.max_message_bytes([25_557_032], [count], 4, DEVICE) * 8 / count <= limit


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_the_bytes_are_fixed(bits: int) -> None:
    """Messages of five tensors, of which one is not used, by the start of their SHA-256."""
    tensors = []
    for numel, count in ((5, 5), (400, 40), (1, 1), (3000, 30), (100_000, 100)):
        j = torch.arange(count)
        values = ((j * 7) % 13 + 1).float() / 2 * (1 - 2 * (j % 3 == 0).float())
        tensors.append(Sparse(j * numel // count, values, numel))
    message, _ = sent(SparseBatch.cat(tensors), bits, used=[True, True, False, True, True])
    assert hashlib.sha256(message.numpy()).hexdigest()[:16] == GOLDEN[bits]


@pytest.mark.parametrize("kind", ["rows", "end", "even"])
def test_what_has_no_room_stays(kind: str) -> None:
    """Clusters: the least values are not sent, the sender is told so, and they keep their momentum."""
    numel, count, j = 1_000_000, 1000, torch.arange(1000)
    indices = {"rows": j % 100 + j // 100 * 100_000, "end": j + numel - count, "even": j * 1000}
    batch = SparseBatch(indices[kind], laplace(count, 1), (count,), (numel,))
    layout, size = Layout.of([numel], DEVICE), wire.max_message_bytes([numel], [count], 4, DEVICE)
    there = batch._replace(
        indices=batch.indices.to(DEVICE), values=batch.values.to(DEVICE, copy=True)
    )
    message, values = wire.encode_batch(there, 4, message_bytes=size)
    u, v = torch.ones(2, numel, device=DEVICE).unbind()
    kernels.release_(u, v, layout, there, values, masking=True)
    message, values = message.cpu(), values.cpu()
    found = wire.decode_batch(message).batch
    kept = values != 0
    cleared = torch.zeros(numel, dtype=torch.bool).index_fill_(0, batch.indices[kept], True)
    assert torch.equal(u.cpu() == 0, cleared)
    assert found.values.tolist() == values[kept].tolist()
    assert found.indices.tolist() == batch.indices[kept].tolist()
    least = rice_code(numel, count).fewer
    assert int(kept.sum()) == (count if kind == "even" else least)
    magnitude = batch.values.abs()
    assert kind == "even" or magnitude[kept].min() >= magnitude[~kept].max()


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_a_gradient_that_is_not_finite(bits: int) -> None:
    message, values = sent(drawn(1000, 20), bits, finite=False)
    found = wire.decode_batch(message, (1000,))
    assert not found.finite
    assert found.batch.counts == (0,)
    assert not bool(values.any())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_not_finite(bad: float) -> None:
    batch = drawn(1000, 20)
    batch.values[7] = bad
    message, values = sent(batch, 4)
    assert not wire.decode_batch(message, (1000,)).finite
    assert not bool(values.any())


def test_a_message_that_could_have_no_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="message_bytes is 30"):
        wire.encode_batch(drawn(1000, 20), 4, message_bytes=30)


@pytest.mark.parametrize("width", [14, 255, 256, 5000])
def test_checksum(width: int) -> None:
    """Of rows of several sizes at a time."""
    from dgc.core.kernels import cuda_message

    sizes = sorted({min(size, width) for size in (4, 5, 255, 256, 257, 1000, 5000)})
    generator = torch.Generator().manual_seed(width)
    data = torch.randint(256, (len(sizes), width), generator=generator).byte()
    found = cuda_message.crc32(data.to(DEVICE), torch.tensor(sizes).to(DEVICE))
    rows = zip(data.tolist(), sizes, strict=True)
    assert found.tolist() == [zlib.crc32(bytes(row[:size])) for row, size in rows]


def test_memory_beside_the_state_stays_under_a_twentieth() -> None:
    numel = 1_000_000
    memory = Memory(Layout.of([numel], DEVICE), dgc.DGC())
    for step in range(3):  # the first steps know no threshold
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        peak = peak_bytes(lambda grad=grad: send_(memory, [grad], updates([Row()]), 0.001, [True]))
    assert 0 < peak <= 0.05 * 8 * numel


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that tensors made by `function` held at a time."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


PATTERNS = [("all-gather", 1), ("shared-indices", 1), ("re-selecting", 1), ("hierarchical", 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
def test_training_equals_the_host_path(
    pattern: str, per_host: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 32-bit values to the bit; a step without finite gradients is skipped by all."""
    config = dgc.DGC(density=0.1, min_selected=2, value_bits=32, pattern=pattern, state_dtype=dtype)

    def found(step: int, rank: int) -> list[Tensor]:
        drawn = gradients(step, rank)
        if (step, rank) == (3, 1):
            drawn[0][1, 2] = torch.inf
        return [grad * (rank != 0 or step < 5) for grad in drawn]  # rank 0 runs out of non-zeros

    def trained(device: torch.device) -> Tensor:
        def body(comm: ThreadCommunicator) -> Tensor:
            model = Toy().to(device)
            options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
            optimizer = wrap(model, config, comm, options)
            train(model, optimizer, range(12), lambda *at: [g.to(device) for g in found(*at)])
            return flat(model).cpu()

        return run_ranks(4, body, per_host)[0]

    there = trained(DEVICE)
    monkeypatch.undo()
    message_plan.cache_clear()
    here = trained(torch.device("cpu"))
    assert bool(here.isfinite().all())
    assert torch.equal(there, here)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # Triton's interpreter
def test_adam_equals_the_host_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a square is not finite, on one rank, too."""
    config = dgc.DGC(density=0.1, min_selected=2, value_bits=32)

    def found(step: int, rank: int) -> list[Tensor]:
        drawn = gradients(step, rank)
        if (step, rank) == (3, 1):
            drawn[0][1, 2] = 1e30
        return drawn

    def trained(device: torch.device) -> Tensor:
        def body(comm: ThreadCommunicator) -> Tensor:
            model = Toy().to(device)
            adam = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
            optimizer = dgc.DistributedOptimizer(adam, model.named_parameters(), config, comm)
            train(model, optimizer, range(8), lambda *at: [g.to(device) for g in found(*at)])
            assert optimizer.stats()["skipped_steps"] == 1
            return flat(model).cpu()

        return run_ranks(2, body)[0]

    there = trained(DEVICE)
    monkeypatch.undo()
    message_plan.cache_clear()
    torch.testing.assert_close(there, trained(torch.device("cpu")), rtol=1e-5, atol=1e-6)
