"""What of a tensor goes into the file: codes of few values, the places of zeros, or all as it is."""

import torch
from torch import Tensor

from dgc.core.codebook import CHUNK, lookup, places
from dgc.core.entropy import count_symbols
from dgc.model.layer import DTYPES, Layer

MIN_CODED_NUMEL = 64  # below this a record costs more than it saves
MAX_CODED_DENSITY = 0.9  # above this, leaving zeros out costs more than it saves


def to_layer(tensor: Tensor, half: bool) -> Layer | None:
    """The codes of a weight tensor, or `None` where storing it as it is takes less."""
    if tensor.dtype not in DTYPES or tensor.numel() < MIN_CODED_NUMEL:
        return None
    flat = tensor.detach().reshape(-1)
    levels = _few_values(flat, min(255, flat.numel() // 4))
    if levels is not None and bool(levels.isfinite().all()):
        return _shared_layer(tensor, levels, half)
    density = float(flat.count_nonzero()) / flat.numel()
    if density > MAX_CODED_DENSITY:
        return None
    return Layer((tensor != 0).to(torch.uint8), flat[flat != 0], literal=True)


def _few_values(flat: Tensor, limit: int) -> Tensor | None:
    """The distinct values but zero, ascending, if there are at most `limit`."""
    found = flat[:0]
    for size in (4096, CHUNK):  # a glance at the start settles it for most
        for part in flat.split(size)[: 1 if size == 4096 else None]:
            found = torch.cat([found, part]).unique()
            if found.numel() > limit + 1:
                return None
    found = found[found != 0]
    return found if found.numel() <= limit else None


def _shared_layer(tensor: Tensor, levels: Tensor, half: bool) -> Layer:
    """Codes in order of falling frequency, so that layers' tables resemble each other."""
    values = torch.cat([levels[levels < 0], levels.new_zeros(1), levels[levels > 0]])
    flat = tensor.detach().reshape(-1)
    place = places(flat, values)
    counts = torch.tensor(count_symbols(place, values.numel()))
    zero = int((levels < 0).sum())
    counts[zero] = flat.numel() + 1  # code 0, however rare
    order = counts.argsort(descending=True, stable=True)
    code = torch.empty_like(order)
    code[order] = torch.arange(order.numel())
    halves = levels.to(torch.float16)  # where one would be infinite or zero, none is
    halved = half and levels.element_size() > 2 and bool((halves.isfinite() & (halves != 0)).all())
    codes = lookup(place, code.to(torch.uint8)).view(tensor.shape)
    return Layer(codes, values[order[1:]], half=halved)
