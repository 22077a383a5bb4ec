"""The bucket of the re-selecting all-reduce: what it sends stays flat in the number of ranks.

Shapes: T tensors in the bucket, n elements in all, K of them sent by a rank, P ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.comm.exchange import Regions, ReselectingAllReduce
from dgc.core import SparseBatch
from dgc.errors import WireError
from dgc.train import wire
from dgc.train.bucket import CompressedBucket, Row, updates
from dgc.train.memory import Memory
from dgc.train.step import Arrival, Sent, message_plan, set_sparse_
from dgc.train.warmup import density_at

KEPT = 4
"""Owners keep KEPT·K/P sums each: an exchange applies up to KEPT times what one rank sends."""
_MAX_EXPONENT = 100  # 2^±100 are normal floats, so that scaling loses nothing


class ReselectingBucket(CompressedBucket):
    """Deep Gradient Compression where owners of regions sum and select again.

    Values travel divided by a power of two of their tensor, on which ranks agree, so that one
    quantiser and one ranking serve all tensors. What an owner drops or rounds off enters its
    residual: Σ over ranks of (residual + sent) is conserved.
    """

    def __init__(self, memory: Memory, world_size: int, rank: int) -> None:
        super().__init__(memory, world_size)
        self.rank = rank
        self.pattern = ReselectingAllReduce(self._route, self._merge)
        self.regions = Regions(self.layout.offsets[-1], world_size)
        self._owed: tuple[Tensor, Tensor] | None = None

    def send(
        self,
        grads: Sequence[Tensor] | None,
        rows: Sequence[Row],
        used: Sequence[bool],
        step: int,
    ) -> Tensor:
        """The agreement, int64 `[3T+1]`: exponents, who has one, who used it, who is not finite."""
        self._begin(self.memory, used, step)
        device, density = self.layout.table.device, density_at(step, self.config)
        self._owed, self._counts = None, message_plan(self.layout.numels, density, self.config)[0]
        empty = torch.zeros(0, dtype=torch.float32, device=device)
        self._batch = SparseBatch(empty.long(), empty, (0,) * len(used), self.layout.numels)
        finite, memory = False, self.memory
        if grads is not None:
            found, batch = self.config.selector.accumulate_select_(
                grads,
                memory.u,
                memory.v,
                self.layout,
                updates(rows),
                self._counts,
                memory.thresholds,
                memory.seed(),
            )
            finite, self._batch = bool(found), batch.filled()
        self._sent = Sent(SparseBatch(empty.long(), empty, (0,) * len(used), ()), empty, None)
        exponents, known = self._exponents() if finite else torch.zeros(2, len(used)).long()
        flags = torch.tensor([*used, not finite], dtype=torch.int64)
        return torch.cat([exponents.cpu(), known.cpu(), flags]).to(device)

    def _exponents(self) -> Tensor:
        """Of each tensor: the binary exponent of its mean selected magnitude, and whether any."""
        tensors = self._tensor_of(self._places(self._batch))
        sums = torch.zeros(len(self.layout.numels), dtype=torch.float64, device=tensors.device)
        sums.index_add_(0, tensors, self._batch.values.double().abs())
        counts = torch.bincount(tensors, minlength=len(sums)).clamp(min=1)
        known = (sums > 0) & sums.isfinite()
        exponents = torch.frexp((sums / counts).where(known, 1.0)).exponent.long()
        return torch.stack([exponents.where(known, 0), known.long()])

    def _route(self, agreement: Tensor) -> list[Tensor] | None:
        """The messages to the owners; takes what they carry out of the memory."""
        exponents, known, used = agreement[:-1].view(3, -1)
        self._finite, self._used = int(agreement[-1]) == 0, tuple((used > 0).tolist())
        if not self._finite:
            return None
        mean = torch.div(exponents, known.clamp(min=1), rounding_mode="floor")
        self._scale = mean.clamp(-_MAX_EXPONENT, _MAX_EXPONENT).int()
        places = self._places(self._batch)
        scale = self._scale[self._tensor_of(places)]
        owner, place = self.regions.locate(places)
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner, minlength=self.world_size).tolist()
        scaled = torch.ldexp(self._batch.values.float(), -scale)[order]
        runs = zip(place[order].split(sizes), scaled.split(sizes), strict=True)
        coded = [self._encode(*run, run[0].numel()) for run in runs]
        held, sent = torch.empty_like(scaled), torch.empty_like(scaled)
        held[order], sent[order] = scaled, torch.cat([values for _, values in coded])
        batch, sent = self._batch._replace(values=held), torch.ldexp(sent, scale)
        self._sent = Sent(batch, sent, self.memory.release_(batch, sent))
        return [message for message, _ in coded]

    def _merge(self, received: Sequence[Tensor]) -> Tensor:
        """Sum what came for this region, keep the largest, let the rest enter the residual."""
        places, values, finite = self._read(received)
        which, inverse = places.unique(return_inverse=True)
        sums = values.new_zeros(which.numel()).index_add_(0, inverse, values)
        kept = sums.abs().topk(min(self._capacity(), sums.numel())).indices.sort().values
        finite = finite and bool(sums.isfinite().all())
        message, coded = self._encode(which[kept], sums[kept], self._capacity(), finite)
        sums[kept] -= coded
        if self.config.local_accumulation and finite:
            at = self._checked(self.rank, which)
            owed = torch.ldexp(sums, self._scale[self._tensor_of(at)])
            self.memory.add_(at, owed)
            self._owed = at, owed
        return message

    def _capacity(self) -> int:
        share = -(-min(KEPT, self.world_size) * sum(self._counts) // self.world_size)
        return min(self.regions.region_numel, share)

    def _encode(
        self, places: Tensor, values: Tensor, room: int, finite: bool = True
    ) -> tuple[Tensor, Tensor]:
        """A message of places in a region, and its values as the receiver will see them."""
        numels, bits = (self.regions.region_numel,), self.config.value_bits
        size = wire.max_message_bytes(numels, (room,), bits, values.device)
        batch = SparseBatch(places, values, (places.numel(),), numels)
        return wire.encode_batch(batch, bits, message_bytes=size, finite=finite)

    def _read(self, messages: Sequence[Tensor]) -> tuple[Tensor, Tensor, bool]:
        read = [wire.decode_batch(each, (self.regions.region_numel,)) for each in messages]
        places = torch.cat([each.batch.indices for each in read])
        values = torch.cat([each.batch.values for each in read])
        return places, values, all(each.finite for each in read)

    def receive_(self, gathered: Tensor, grads: Sequence[Tensor], rows: Sequence[Row]) -> Arrival:
        if not self._finite:
            return Arrival(False, self._used)
        parts = [self._read([message]) for message in gathered]
        at = torch.cat([self._checked(owner, part[0]) for owner, part in enumerate(parts)])
        at, order = at.sort()
        tensors = self._tensor_of(at)
        values = torch.cat([part[1] for part in parts])[order]
        values = torch.ldexp(values, self._scale[tensors])
        sizes = torch.bincount(tensors, minlength=len(grads)).tolist()
        local = at - self.layout.table[tensors]
        batch = SparseBatch(local, values, tuple(sizes), self.layout.numels)
        set_sparse_(grads, batch, [1 / (self.world_size * row.applied_lr) for row in rows])
        return Arrival(all(part[2] for part in parts), self._used)

    def put_back_(self) -> None:
        super().put_back_()
        if self._owed is not None:
            at, owed = self._owed
            self.memory.add_(at, -owed)

    def _checked(self, owner: int, places: Tensor) -> Tensor:
        at = self.regions.indices(owner, places)
        if at.numel() and int(at.max()) >= self.regions.numel:
            raise WireError(f"index {int(at.max())} in a bucket of {self.regions.numel} elements")
        return at

    def _places(self, batch: SparseBatch) -> Tensor:
        return self.layout.places(batch.indices, batch.counts)

    def _tensor_of(self, places: Tensor) -> Tensor:
        """Which tensor of the bucket each flat position belongs to, int64."""
        return torch.searchsorted(self.layout.table[1:], places, right=True)
