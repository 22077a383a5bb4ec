"""What a user chooses: frozen, keyword-only, checked where it is given."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from dgc.core.select import Selector, ThresholdTopK
from dgc.errors import ConfigError

VALUE_BITS = (1, 2, 3, 4, 8, 16, 32)
PATTERNS = ("all-gather", "dense", "hierarchical", "shared-indices", "re-selecting", "auto")
_DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STATE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What every compression has in common."""

    bucket_bytes: int = 25 * 2**20
    """Parameters are exchanged in buckets of about this many bytes of fp32 gradient, >= 1. Smaller
    ones overlap more of the backward pass, larger ones cost fewer messages."""

    max_skipped_steps: int | None = 10
    """A step in which any rank has a non-finite gradient is skipped by all ranks. More than this
    many in a row raise `GradientError`; None never does."""

    def __post_init__(self) -> None:
        _check("bucket_bytes", self.bucket_bytes, self.bucket_bytes >= 1, "at least 1")
        if self.max_skipped_steps is not None:
            good = self.max_skipped_steps >= 0
            _check("max_skipped_steps", self.max_skipped_steps, good, "at least 0, or None")

    def describe(self) -> str:
        """Every field with its value, one a line, the same on every rank of a sound job."""
        return "\n".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


@dataclass(frozen=True, kw_only=True)
class Dense(Compression):
    """No compression: a dense all-reduce through the same wrapper.

    Example:
        >>> Dense().dtype
        torch.float32
    """

    dtype: torch.dtype = torch.float32
    """What travels: torch.float32, torch.float16 or torch.bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("dtype", self.dtype, self.dtype in _DENSE_DTYPES, f"one of {_DENSE_DTYPES}")


@dataclass(frozen=True, kw_only=True)
class DGC(Compression):
    """Deep Gradient Compression (Lin et al., ICLR 2018, arXiv 1712.01887).

    Example:
        >>> DGC(density=0.01, warmup_steps=100).density
        0.01
    """

    density: float = 0.001
    """Share of each parameter's elements that is sent in a step, in (0, 1]. A rank keeps an
    element for about 1/density steps. For a few thousand steps of SGD 0.0035 with 1-bit values, after
    some 25 steps of warm-up, keeps more accuracy than 0.001 with 4 bits after 120, for about the same
    bytes; for a small Transformer with Adam 0.008, with 1-bit values, 1 element of each parameter at
    least and no warm-up (docs/log.md, 2026-11-26)."""

    min_selected: int = 16
    """Elements of a parameter that are sent at least, >= 1, or all if it has fewer. At one element a
    step, as `density` alone would have it, biases and small layers learn too slowly: 0.4 points of
    accuracy on LeNet-300-100 (docs/log.md, 2026-11-25). A small Transformer has so many small
    tensors that these take most of a message: 1 and a higher density are better there at the same
    bytes (2026-11-26)."""

    value_bits: int = 4
    """Bits of a sent value: 1, 2, 3, 4, 8, 16 or 32. What rounding loses stays in the residual."""

    warmup_steps: int = 0
    """Steps over which the density falls exponentially from `warmup_density`, by a factor of 4 a
    stage, to `density`; 0 starts at `density`. With SGD it keeps the first steps stable. In training
    of a few epochs half an epoch of it is most of the bytes, and a higher density after a tenth of an
    epoch, or with Adam after none, is better (docs/log.md, 2026-11-26). In long training let it
    fall while the learning rate rises, from 1/64: an LSTM needed both (2026-11-27)."""

    warmup_density: float = 0.25
    """Density of the first warm-up stage, in (0, 1]."""

    clip_norm: float | None = None
    """Local gradient clipping: each rank's gradient, all parameters together, is scaled to a norm
    of at most clip_norm · N^-1/2 before it enters the memory. The norm needs the whole gradient,
    so compression then starts when the backward pass has ended. None does not clip."""

    momentum_correction: bool = True
    """The memory applies the optimizer before accumulation: SGD's momentum; of Adam and AdamW the step
    by each rank's own second moment, without β1 (`dgc.train.adam`). False leaves it to the optimizer,
    after the exchange: plain error feedback, for any optimizer; with AdamW it is far behind
    (docs/log.md, 2026-11-25)."""

    momentum_masking: bool = True
    """Momentum factor masking: the momentum of what was sent is set to zero, and a rank's share of that
    of weight decay. Stable at learning rates where training without it diverges, but elements that
    are sent often then have less momentum: try one and a half times to twice the learning rate of
    dense training (docs/log.md, 2026-11-24 and 26).
    Without momentum in the memory, so with Adam, there is nothing to mask."""

    local_accumulation: bool = True
    """What is not sent stays and is sent later. False forgets it, as an ablation."""

    fold_lr: bool = False
    """False accumulates gradients, as the paper, and what is sent is applied with the learning rate of
    the step in which it arrives. True accumulates them after scaling with the rate of their own step,
    so that a change of rate does not rescale what was left over: where the rate falls in steps this
    costs half a point of accuracy on LeNet-300-100, in 5 epochs with a cosine a quarter (docs/log.md,
    2026-11-25)."""

    selector: Selector = ThresholdTopK()
    """How the largest elements are found; see `dgc.core.select`."""

    state_dtype: torch.dtype = torch.float32
    """How momentum and residual are kept: torch.float32, 8 bytes for each element of the parameters
    (4 without momentum correction, and with Adam, whose second moment takes 4 more with either
    dtype); or torch.bfloat16, half of that. Arithmetic is float32 with both.
    A bfloat16 memory rounds what it stores up or down at random, by less than 2^-7 of it, to the
    value in the mean; the random numbers follow from rank and step, so runs repeat and resume bit
    for bit. Its accuracy is in docs/log.md, 2026-11-24."""

    pattern: str = "all-gather"
    """How messages travel. "all-gather": all to all ranks, so a rank receives in proportion to their
    number. "hierarchical": ranks of a host sum their gradients, messages travel between hosts.
    "shared-indices": ranks choose by turns what all send; flat in the number of ranks, but all that
    waited at a place arrives at once, which costs accuracy and wants a quarter of the learning rate
    (docs/log.md, 2026-11-26). "re-selecting": owners of regions sum and select again; flat too, and
    what they drop stays in their residuals. "dense": all of the residual, uncoded. "auto": the fastest
    of all but shared indices by costs measured at the start, for each density of the warm-up; rank 0
    says which on stderr. Runs with "auto" may differ in the last bits, as the choice may."""

    exclude: tuple[str, ...] = ()
    """Patterns (`fnmatch`) of the names of parameters that are exchanged dense."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("density", self.density, 0 < self.density <= 1, "in (0, 1]")
        _check("min_selected", self.min_selected, self.min_selected >= 1, "at least 1")
        good = isinstance(self.value_bits, int) and self.value_bits in VALUE_BITS
        _check("value_bits", self.value_bits, good, f"one of {VALUE_BITS}")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        good = 0 < self.warmup_density <= 1
        _check("warmup_density", self.warmup_density, good, "in (0, 1]")
        if self.clip_norm is not None:
            _check("clip_norm", self.clip_norm, self.clip_norm > 0, "positive, or None")
        good = self.state_dtype in _STATE_DTYPES
        _check("state_dtype", self.state_dtype, good, f"one of {_STATE_DTYPES}")
        _check("pattern", self.pattern, self.pattern in PATTERNS, f"one of {PATTERNS}")
        good = isinstance(self.exclude, tuple) and all(isinstance(e, str) for e in self.exclude)
        _check("exclude", self.exclude, good, "a tuple of patterns")

    @classmethod
    def paper(cls, *, warmup_steps: int, clip_norm: float | None = None, **changes: Any) -> "DGC":
        """The paper's own recipe: fp32 values, and no least number of them.

        Example:
            >>> DGC.paper(warmup_steps=400).value_bits
            32
        """
        recipe = {"value_bits": 32, "min_selected": 1, **changes}
        return cls(warmup_steps=warmup_steps, clip_norm=clip_norm, **recipe)


def _check(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value!r}: it must be {allowed}")
