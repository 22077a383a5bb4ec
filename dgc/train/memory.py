"""What a rank keeps of its gradients: momentum u and residual v of one bucket."""

from copy import copy

import numpy as np
import torch
from torch import Tensor

from dgc.config import DGC
from dgc.core import SparseBatch, kernels
from dgc.core.layout import Layout


class Memory:
    """Momentum and residual of the T tensors of a bucket, each flat, `[n]`.

    Conservation: Σ sent + v = Σ what entered, to rounding. In float32 that is the rounding of sums.
    In bfloat16 each value that is stored is off by less than 2^-7 of itself, and by zero in the
    mean: the difference grows like a random walk, and not at all where nothing is added.

    Args:
        layout: where each tensor lies.
        config: `DGC`, with the dtype of the state.
        rank: so that ranks round independently.

    Attributes:
        u: momentum, or None without momentum correction.
        v: the residual: what entered and has not been sent.
        thresholds: the selector's guess; it saves time and never changes what is selected.
    """

    def __init__(self, layout: Layout, config: DGC, rank: int = 0) -> None:
        device, numel = layout.table.device, layout.offsets[-1]
        self.layout, self.config, self.rank = layout, config, rank
        self.v = torch.zeros(numel, dtype=config.state_dtype, device=device)
        self.u = torch.zeros_like(self.v) if config.momentum_correction else None
        self.thresholds = config.selector.state(layout)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Training step `step` begins: what is rounded depends on it, and on nothing before."""
        self._step, self._writes = step, 0

    def seed(self) -> int:
        """For the rounding of the next write to `u` and `v`."""
        self._writes += 1
        return kernels.seed_of(self.rank, self._step, self._writes)

    def part(self, layout: Layout, start: int) -> "Memory":
        """The elements from `start` on that `layout` describes: shares u and v."""
        part = copy(self)
        part.layout, part.thresholds = layout, self.config.selector.state(layout)
        end = start + layout.offsets[-1]
        part.u = None if self.u is None else self.u[start:end]
        part.v = self.v[start:end]
        return part

    def release_(
        self, batch: SparseBatch, sent: Tensor, seed: int | Tensor | None = None
    ) -> Tensor | None:
        """Take what was sent out of `v`; the momentum that masking cleared is returned."""
        seed = self.seed() if seed is None else seed
        masking = self.config.momentum_masking
        cleared = kernels.release_(self.u, self.v, self.layout, batch, sent, masking, seed)
        if not self.config.local_accumulation:
            self.v.zero_()
        return cleared

    def put_back_(self, batch: SparseBatch, sent: Tensor, cleared: Tensor | None) -> None:
        """Undo `release_`, to rounding: the message was not applied by anybody."""
        places = self._places(batch)
        if self.config.local_accumulation:
            self.add_(places, sent)
        if cleared is not None and self.u is not None:
            self.u[places] = cleared

    def add_(self, places: Tensor, values: Tensor) -> None:
        """Let `values` float32 `[K]` enter the residual at `places` int64 `[K]`, all different."""
        kernels.add_(self.v, places, values, self.seed())

    def at(self, batch: SparseBatch) -> Tensor:
        """The residual at the places of `batch`, float32 `[K]`."""
        return self.v.index_select(0, self._places(batch)).float()

    def _places(self, batch: SparseBatch) -> Tensor:
        """Positions of the selected elements in the flat state, int64 `[K]`."""
        if kernels.codes_there(self.v.device):
            return self.layout.places(batch.indices, batch.counts)
        # On the host repeat_interleave, like v[places], would wake torch's threads: they then wait
        # for more and take the next kernel's core.
        starts = np.repeat(np.array(self.layout.offsets[:-1], np.int64), batch.counts)
        return batch.indices + torch.from_numpy(starts).to(self.v.device)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Views of the state of one tensor, by the paper's names."""
        states = {"v": self.v} if self.u is None else {"u": self.u, "v": self.v}
        start, end = self.layout.offsets[index : index + 2]
        return {name: state[start:end] for name, state in states.items()}
