"""The compiled body codec against its definition, bit for bit."""

from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dgc.core.kernels import codec_cpu, codec_reference
from dgc.core.kernels.codec_reference import Status
from dgc.core.pack import choose_code
from dgc.core.quantize import VALUE_BITS

INTERESTING = [0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.0, -1.0, 1.0000001, 2.5, -1e38, 3.4028235e38]
values = st.one_of(
    st.sampled_from(INTERESTING),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(-8, 8).map(float),
)


@st.composite
def bodies(draw: Any) -> tuple[Any, ...]:
    """indices, values, counts, ends, code, value_bits."""
    numels = [*draw(st.lists(st.integers(0, 60), max_size=5)), draw(st.integers(1, 60))]
    runs = [
        sorted(draw(st.sets(st.integers(0, numel - 1), max_size=numel))) if numel else []
        for numel in numels
    ]
    scale = draw(st.sampled_from([1, 1, 1 << 20]))
    indices = np.array([i * scale for run in runs for i in run], np.int64)
    counts = np.array([len(run) for run in runs], np.int64)
    data = draw(st.lists(values, min_size=len(indices), max_size=len(indices)))
    ends = np.cumsum([numel * scale for numel in numels]).astype(np.int64)
    best = choose_code(int(ends[-1]), len(indices))
    code = draw(st.sampled_from([best, best, draw(st.integers(0, 255))]))
    if scale > 1:
        code = max(code, 80)
    return (
        indices,
        np.array(data, np.float32),
        counts,
        ends,
        code,
        draw(st.sampled_from(VALUE_BITS)),
    )


@settings(max_examples=300, deadline=None)
@given(bodies())
def test_same_bytes_and_round_trip(case: tuple[Any, ...]) -> None:
    indices, data, counts, ends, code, bits = case
    assume(len(indices) > 0)
    body, decoded, status = codec_reference.encode(*case)
    fast_body, fast_decoded, fast_status = codec_cpu.encode(*case)
    assert status is fast_status is Status.OK
    for section, fast in zip(body, fast_body, strict=True):
        assert section.tobytes() == fast.tobytes()
    assert decoded.tobytes() == fast_decoded.tobytes()
    for codec in (codec_reference, codec_cpu):
        positions, got, got_counts, status = codec.decode(body, len(indices), ends, code, bits)
        assert status is Status.OK
        assert got.tobytes() == decoded.tobytes()
        assert got_counts.tolist() == counts.tolist()
        starts = np.repeat(np.concatenate([[0], ends[:-1]]), counts)
        assert (positions - starts).tolist() == indices.tolist()
    assert np.isfinite(decoded).all()
    assert (np.signbit(decoded) == np.signbit(data)).all()
    if bits == 32:
        assert decoded.tobytes() == data.tobytes()
