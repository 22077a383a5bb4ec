"""Shared weights: every weight of a layer is zero or one of a few values, which keep training.

Source: Han, Mao, Dally, *Deep Compression*, arXiv 1510.00149, section 3.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dgc.core import codebook
from dgc.errors import ConfigError
from dgc.model.constrain import Constraint, bind_root, choose, refuse_non_finite, refuse_others
from dgc.model.progress import bar

Model = TypeVar("Model", bound=nn.Module)

STARTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "kmeans": codebook.kmeans_levels,
    "linear": lambda values, k: codebook.lloyd(values, codebook.linear_levels(values, k)),
    "density": lambda values, k: codebook.lloyd(values, codebook.density_levels(values, k)),
    "random": lambda values, k: codebook.lloyd(values, codebook.random_levels(values, k)),
}
"""Where levels come from: the exact optimum, or Lloyd's iterations from the paper's three starts."""


class Shared(Constraint):
    """Equal codes have equal values; the buffer `<name>_codes` is uint8, code 0 is zero.

    The value of a code is learnt: each member's gradient is replaced by the sum over the members,
    ∂L/∂c = Σ_{i: code_i = c} ∂L/∂w_i, so any elementwise optimizer moves them all alike.
    """

    suffix = "codes"

    def gradient(self, buffer: Tensor, grad: Tensor) -> Tensor:
        if grad.is_sparse:
            raise ConfigError(f"{self.name} has shared values: make its embedding sparse=False")
        codes = buffer.reshape(-1).int()
        sums = torch.zeros(256, dtype=torch.promote_types(grad.dtype, torch.float32)).to(
            grad.device
        )
        sums.index_add_(0, codes, grad.reshape(-1).to(sums.dtype))
        sums[0] = 0
        return codebook.lookup(buffer, sums.to(grad.dtype)).view_as(grad)

    def project_(self, buffer: Tensor, values: Tensor) -> None:
        codes, flat = buffer.reshape(-1), values.reshape(-1)
        # Means are taken in 32 bits or more: sums of 16 bits stop growing.
        levels = levels_of(codes, flat).to(torch.promote_types(flat.dtype, torch.float32))
        # The mean difference from one member is exactly zero when all agree, so that projecting
        # twice changes no bit; it is not when an optimizer's older momentum moved them apart.
        sums, counts = levels.new_zeros(256), levels.new_zeros(256)
        for part, value in zip(
            codes.split(codebook.CHUNK), flat.split(codebook.CHUNK), strict=True
        ):
            code = part.int()
            sums.index_add_(0, code, value.to(levels.dtype) - levels[code])
            counts += torch.bincount(code, minlength=256).to(counts.dtype)
        means = levels + sums / counts.clamp(min=1)
        means[0] = 0
        values.copy_(codebook.lookup(buffer, means.to(values.dtype)))


def levels_of(codes: Tensor, values: Tensor) -> Tensor:
    """The value of some member of each code, `[256]`; zero for code 0 and codes without members."""
    levels = values.new_zeros(256)
    parts = zip(codes.split(codebook.CHUNK), values.split(codebook.CHUNK), strict=True)
    for code, value in parts:
        levels[code.int()] = value
    levels[0] = 0
    return levels


def share(
    model: Model,
    bits: int | dict[str, int] = 5,
    *,
    init: str = "kmeans",
    penalty: float | dict[str, float] = 0.0,
    progress: bool = False,
) -> Model:
    """Replace each weight by zero or one of 2^bits − 1 learnt values of its layer.

    Weights that are zero stay zero. Retrain with any loop afterwards: values learn by the gradient
    summed over their members, codes stay. Optimizers keep working; one made afresh carries no
    momentum from before. Of averaged copies (EMA) leave the codes alone, which are buffers: torch's
    `AveragedModel(use_buffers=True)` would average them too.

    Args:
        model: changed in place; masks of `prune` become code 0.
        bits: 1 to 8, for all weights or by layer or parameter name.
        init: `"kmeans"` (optimal where weights × levels are 2^22 at most; beyond, nearly so, by means of
            runs of neighbours), `"linear"`, `"density"` or `"random"`.
        penalty: λ ≥ 0: squared error, relative to the mean square, worth one coded bit. Around
            0.001 to 0.03 it drops rare values and prunes further; 0 takes the nearest value.
        progress: show a bar.

    Returns:
        `model`.

    Raises:
        ConfigError: if bits, init or penalty is out of range, a name unknown or a weight not
            finite; nothing is shared then.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 5.0, 3.0, 0.0]]))
        >>> share(layer, bits=1).weight.tolist()
        [[3.0, 3.0, 3.0, 0.0]]
        >>> layer.weight.sum().backward()
        >>> layer.weight.grad.tolist()
        [[3.0, 3.0, 3.0, 0.0]]

    Source: arXiv 1510.00149, section 3.3 for the gradient; the penalty is Chou, Lookabaugh, Gray,
    *Entropy-Constrained Vector Quantization*, 1989.
    """
    if init not in STARTS:
        raise ConfigError(f"init is {init!r}: one of {sorted(STARTS)}")
    chosen = choose(model, bits, "bits")
    by_name = penalty if isinstance(penalty, dict) else dict.fromkeys(chosen, penalty)
    penalties = {n: price for n, (_, _, price) in choose(model, by_name, "penalty").items()}
    refuse_others(penalties, chosen, "penalty", "bits")
    for name, price in penalties.items():
        if not 0 <= price < float("inf"):
            raise ConfigError(f"penalty of {name} is {price}: give 0 or more")
    for name, (module, own, width) in chosen.items():
        if isinstance(width, float) or width not in range(1, 9):
            raise ConfigError(f"bits of {name} is {width}: give 1 to 8")
        refuse_non_finite(module, own, name)
        Shared(own).refuse_taken(module)
    for name, (module, own, width) in bar(list(chosen.items()), "share", progress):
        weight = module.get_parameter(own).detach()
        codes, levels = quantise(weight, width, init, penalties.get(name, 0.0))
        weight.copy_(codebook.lookup(codes, levels.to(weight.dtype)))
        Shared(own).install(module, codes)
    bind_root(model)
    return model


def quantise(weight: Tensor, bits: int, init: str, penalty: float) -> tuple[Tensor, Tensor]:
    """Codes, uint8 shaped as `weight`, and the value of each code, `[256]`, on its device."""
    # Indexed by a mask, a tensor takes 8 bytes more for each weight and dimension: so in chunks.
    flat = weight.reshape(-1)
    values = flat
    if not bool(flat.all()):
        values = torch.cat([part[part != 0] for part in flat.split(codebook.CHUNK)])
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    table = torch.zeros(256, dtype=torch.float64, device=weight.device)
    if values.numel():
        scale = _scale(values) if values.dtype == torch.float64 else 1.0
        if scale != 1.0:
            values = values / scale
        start = STARTS[init](values, 2**bits - 1)
        # The value zero is code 0: a level for kept weights whose mean it is lies beside it.
        tiny = torch.finfo(torch.float32).tiny
        start = start.masked_fill(start == 0, tiny).unique()
        zeros = weight.numel() - values.numel()
        levels, chosen = codebook.entropy_codes(values.cpu(), start, zeros, penalty)
        codes.masked_scatter_(weight != 0, chosen.to(weight.device))
        table[1 : 1 + levels.numel()] = levels.to(weight.device) * scale
    return codes, table


def _scale(values: Tensor) -> float:
    """A power of two that brings `values` to about 1 at most, so that squares stay in range."""
    exponent = math.frexp(max(abs(float(end)) for end in values.aminmax()))[1]
    return 2.0 ** max(-1000, min(1000, exponent))
