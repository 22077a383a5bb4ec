"""A message made where the values are, for a GPU, whose host waits for nothing.

The layout is that of docs/wire.md, `frame.write_frame` writes it on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.core.rice import rice_code
from dgc.core.sparse import SparseBatch
from dgc.core.tables import Table
from dgc.errors import ConfigError
from dgc.train.frame import NOT_FINITE, frame_head, max_frame_bytes


def encode_rice(
    batch: SparseBatch,
    value_bits: int,
    *,
    message_bytes: int,
    finite: bool | Tensor = True,
    used: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """`wire.encode_batch` of one value or more, where the values are, for a GPU.

    The host waits for nothing. Indices are not checked, and a slot of value 0 is not sent. Where the
    indices exceed the room that `dgc.core.rice` gives them, as clusters may, the values that are
    least in their tensor are not sent: 4 % at density 0.001. What is not sent becomes 0 in `batch`, so
    that masking leaves its momentum. On the CPU it runs in Triton's interpreter (`TRITON_INTERPRET=1`).
    """
    from dgc.core.kernels import codec_cuda

    device, numels = batch.values.device, batch.numels
    code = rice_code(sum(numels), batch.values.numel())
    least = max_frame_bytes(numels, batch.counts, value_bits, rice=True)
    if least > message_bytes:
        raise ConfigError(f"messages take up to {least} bytes, message_bytes is {message_bytes}")
    if not isinstance(finite, Tensor):
        finite = torch.full((), finite, dtype=torch.bool, device=device)
    with torch.cuda.device_of(batch.values):  # Triton launches on the current device
        return codec_cuda.encode(
            *(batch, finite, code, value_bits),
            head=_head(numels, value_bits, None if used is None else tuple(used), device),
            not_finite=NOT_FINITE,
            message_bytes=message_bytes,
        )


@Table
def _head(
    numels: tuple[int, ...], value_bits: int, used: tuple[bool, ...] | None, device: torch.device
) -> Tensor:
    data = bytearray(frame_head(numels, value_bits, 0, used, rice=True))
    return torch.frombuffer(data, dtype=torch.uint8).to(device)
