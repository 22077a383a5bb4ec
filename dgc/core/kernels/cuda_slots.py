"""What Triton kernels over the slots of a bucket share: T tensors, each with a run of slots.

A program works on BLOCK slots of one tensor: from firsts[b] on, of the sizes[t] of tensor
t = owners[b], whose first slot is begins[t].
"""

from typing import Any

import triton
import triton.language as tl

from dgc.core.kernels.cuda_kernels import MAGNITUDE


@triton.jit  # type: ignore[untyped-decorator]
def slots_of(
    owners: "Any", firsts: "Any", sizes: "Any", begins: "Any", BLOCK: tl.constexpr
) -> "Any":
    """The program's tensor, slots counted from its first, slots, and which of these there are.

    Example: b = 1, owners = [0, 1], firsts = [0, 0], sizes = [3, 2], begins = [0, 3]: tensor 1, slots
    3 and 4.
    """
    b = tl.program_id(0)
    t = tl.load(owners + b)
    at = tl.load(firsts + b) + tl.arange(0, BLOCK)
    return t, at, tl.load(begins + t) + at, at < tl.load(sizes + t)


@triton.jit  # type: ignore[untyped-decorator]
def magnitude_of(values: "Any", slot: "Any", inside: "Any") -> "Any":
    """|value| as bits, int64; 0 where not `inside`. Example: -1.0 gives 0x3F800000."""
    bits = tl.load(values + slot, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return (bits & MAGNITUDE).to(tl.int64)
