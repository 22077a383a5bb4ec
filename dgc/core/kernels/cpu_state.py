"""How compiled loops read and write a state: float32 in place, bfloat16 through a float32 block.

A bfloat16 state is an int16 array here, the upper halves of float32.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from dgc.core.kernels.compiled import kernel
from dgc.core.kernels.rounding import U_BITS, V_BITS


def opened(state: Any, first: Any, last: Any, spare: Any) -> Any:
    """The elements [first, last) as float32: where they lie, or of bfloat16 a copy in `spare`."""
    return state[first:last]


def close(moved: Any, u: Any, block: Any, v: Any, first: Any, seed: Any) -> None:
    """Store `moved` in u and `block` in v, both `opened` at `first`; `moved` may be empty.

    Copies are rounded as `rounding.rounded` says, and `block` then holds what v does, for the search.
    """


def lessen(v: Any, at: Any, sent: Any, seed: Any) -> None:
    """v[at] ← v[at] − sent, rounded as `close` does."""
    v[at] -= sent


@overload(opened)
def _opened(state: Any, first: Any, last: Any, spare: Any) -> Any:
    return opened if state.dtype == types.float32 else _opened_halves


@overload(close)
def _close(moved: Any, u: Any, block: Any, v: Any, first: Any, seed: Any) -> Any:
    return close if v.dtype == types.float32 else _close_halves


@overload(lessen)
def _lessen(v: Any, at: Any, sent: Any, seed: Any) -> Any:
    return lessen if v.dtype == types.float32 else _lessen_half


def _lessen_half(v: Any, at: Any, sent: Any, seed: Any) -> None:
    left = np.int32(np.int32(v[at]) << np.int32(16)).view(np.float32) - sent
    random = _mixed(np.uint32(at) ^ seed) >> np.uint32(V_BITS)
    v[at] = _half(np.float32(left).view(np.int32), random)


def _opened_halves(state: Any, first: Any, last: Any, spare: Any) -> Any:
    halves, block = state[first:last], spare[: last - first]
    raw = block.view(np.int32)
    for i in range(raw.size):
        raw[i] = np.int32(halves[i]) << np.int32(16)
    return block


def _close_halves(moved: Any, u: Any, block: Any, v: Any, first: Any, seed: Any) -> None:
    last = first + block.size
    if moved.size:
        _narrow_both(
            moved.view(np.int32), u[first:last], block.view(np.int32), v[first:last], first, seed
        )
    else:
        _narrow(block.view(np.int32), v[first:last], first, seed)


@kernel
def _narrow_both(moved: Any, u: Any, block: Any, v: Any, first: int, seed: Any) -> None:
    for i in range(block.size):
        random = _mixed(np.uint32(first + i) ^ seed)
        u[i] = _half(moved[i], random >> np.uint32(U_BITS))
        v[i] = _half(block[i], random >> np.uint32(V_BITS))
        block[i] = np.int32(v[i]) << np.int32(16)


@kernel
def _narrow(block: Any, v: Any, first: int, seed: Any) -> None:
    for i in range(block.size):
        v[i] = _half(block[i], _mixed(np.uint32(first + i) ^ seed) >> np.uint32(V_BITS))
        block[i] = np.int32(v[i]) << np.int32(16)


@kernel
def _half(raw: Any, random: Any) -> Any:
    """Example: 0x3F80C000 becomes 0x3F81 where the low half of `random` is 0x4000 or more."""
    draw = np.int32(np.uint32(random) & np.uint32(0xFFFF))
    return np.int16(np.int32(raw + draw) >> np.int32(16))


@kernel
def _mixed(x: Any) -> Any:
    """`rounding.mixed` of a uint32."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))
