"""One step of Deep Gradient Compression on one bucket (Lin et al., ICLR 2018, algorithms 1 to 4).

Shapes: T tensors in the bucket, n elements in all, K of them sent, P ranks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from dgc.config import DGC
from dgc.core import SparseBatch, num_selected
from dgc.train import wire
from dgc.train.memory import Memory


class Sent(NamedTuple):
    """What left a memory in one step: enough to put it back."""

    batch: SparseBatch
    values: Tensor
    cleared: Tensor | None


def send_(
    memory: Memory,
    grads: Sequence[Tensor] | Tensor,
    update: Tensor,
    density: float,
    used: Sequence[bool],
    seeds: Sequence[int | Tensor] | None = None,
) -> tuple[Tensor, Sent]:
    """Let gradients enter `memory`, take out the largest elements, and encode them.

        u ← m·u + c·g                momentum correction, c the clipping scale
        v ← v + lr·u                 local accumulation
        S ← the k largest |v|        per tensor, k = max(min_selected, ceil(density·numel))
        q ← Q(v[S])                  value quantiser
        v[S] ← v[S] − q              what quantisation lost stays: error feedback
        u[S] ← 0                     momentum factor masking (optional)

    Args:
        memory: u and v, overwritten.
        grads: T contiguous tensors, read only; on a GPU also their `kernels.addresses` there.
        update: float32 `[T, 4]`, rows (m, c, lr, nesterov).
        density: share of each tensor's elements to send, in (0, 1].
        used: whether each tensor had a gradient on this rank.
        seeds: of what enters and what is taken out; the memory's own by default.

    Returns:
        The message, uint8, of a size that depends only on the shapes, and what it took out. If a
        gradient is not finite, nothing enters and the message says so.
    """
    config: DGC = memory.config
    device = memory.v.device
    counts, message_bytes = message_plan(memory.layout.numels, density, config, device)
    entered, taken = seeds or (memory.seed(), memory.seed())
    with record_function("dgc::select"):
        finite, batch = config.selector.accumulate_select_(
            *(grads, memory.u, memory.v, memory.layout, update, counts),
            *(memory.thresholds, entered),
        )
    with record_function("dgc::encode"):
        message, values = wire.encode_batch(
            batch, config.value_bits, message_bytes=message_bytes, finite=finite, used=used
        )
    return message, Sent(batch, values, memory.release_(batch, values, taken))


def abstain(memory: Memory, density: float) -> tuple[Tensor, Sent]:
    """The message of a rank whose whole gradient is not finite: empty, and it says so."""
    numels, bits = memory.layout.numels, memory.config.value_bits
    none = torch.zeros(0, dtype=torch.float32, device=memory.v.device)
    batch = SparseBatch(none.long(), none, (0,) * len(numels), numels)
    size = message_plan(numels, density, memory.config, memory.v.device)[1]
    message, values = wire.encode_batch(batch, bits, message_bytes=size, finite=False)
    return message, Sent(batch, values, None)


@lru_cache(maxsize=4096)
def message_plan(
    numels: tuple[int, ...], density: float, config: DGC, device: torch.device | None = None
) -> tuple[tuple[int, ...], int]:
    """How many elements of each tensor are sent, and the size of the message in bytes."""
    counts = tuple(num_selected(numel, density, config.min_selected) for numel in numels)
    return counts, wire.max_message_bytes(numels, counts, config.value_bits, device)


class Arrival(NamedTuple):
    """What the messages of all ranks said together."""

    finite: bool
    used: tuple[bool, ...]


def receive_(messages: Tensor, grads: Sequence[Tensor], scales: Sequence[float]) -> Arrival:
    """g̅ ← scale · Σ_i scatter(S_i, q_i): decode `[P, bytes]` messages into dense gradients.

    Args:
        messages: uint8 `[P, bytes]`.
        grads: T contiguous float32 tensors, overwritten.
        scales: a factor for each tensor, 1/P and what undoes the folded learning rate.

    Raises:
        WireError: a message was damaged on its way.
    """
    heads = wire.set_mean_(messages, grads, scales)
    used = zip(*(head.used for head in heads), strict=True)
    return Arrival(all(head.finite for head in heads), tuple(any(ranks) for ranks in used))


def set_sparse_(grads: Sequence[Tensor], batch: SparseBatch, scales: Sequence[float]) -> None:
    """g̅ ← scale · batch, zero elsewhere: overwrites T contiguous float32 `grads`."""
    for grad, each, scale in zip(grads, batch.split(), scales, strict=True):
        grad.zero_().view(-1)[each.indices] = each.values * scale
