"""Gradient messages: the byte layout of docs/wire.md.

A message is checked in full, checksum, sizes, every index and every value, before anything is
returned or added: any bytes give the right answer or a `WireError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.kernels.codec_reference import Body, Status
from dgc.core.pack import choose_code
from dgc.core.quantize import check_value_bits
from dgc.core.sparse import Sparse, SparseBatch
from dgc.errors import ConfigError, GradientError, WireError
from dgc.train.assemble import encode_rice
from dgc.train.frame import Header, max_frame_bytes, read_frame, write_frame

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

FINDINGS = {
    Status.PARAMETER: "a quantiser level is not finite or lies above the next",
    Status.VALUE: "a value is not finite",
    Status.STATE: "the index coder's first state is out of range",
    Status.EXHAUSTED: "the index stream ends before the last index",
    Status.LEFT_OVER: "the index stream goes on after the last index",
    Status.INDEX: "an index lies outside the tensors",
    Status.FILL: "the bits that fill up a section are not zero",
}


@dataclass(frozen=True)
class Message:
    """A decoded message; see `Header` for `finite` and `used`."""

    batch: SparseBatch
    finite: bool
    used: tuple[bool, ...]


def encode(tensors: Sequence[Sparse], value_bits: int) -> Tensor:
    """One message for `tensors`, without padding.

    Args:
        tensors: indices int64 ascending, values finite, read as float32.
        value_bits: 1, 2, 3, 4, 8, 16 or 32; with 32 nothing is lost.

    Returns:
        uint8 `[bytes]`, on the tensors' device.

    Raises:
        ConfigError: `value_bits` or the indices cannot be encoded.
        GradientError: a value is not finite.

    Example:
        >>> one = Sparse(torch.tensor([1, 3]), torch.tensor([2.0, -1.0]), 5)
        >>> message = encode([one], 32)
        >>> message.numel(), decode(message)[0].to_dense().tolist()
        (33, [0.0, 2.0, 0.0, -1.0, 0.0])
    """
    if tensors:
        batch = SparseBatch.cat(tensors)
    else:
        batch = SparseBatch(torch.zeros(0, dtype=torch.int64), torch.zeros(0), (), ())
    message, _, finite = _encode(batch, check_value_bits(value_bits), True, None)
    if not finite:
        raise GradientError("a value to encode is NaN or infinite: skip this step or unscale first")
    return torch.frombuffer(bytearray(message), dtype=torch.uint8).to(batch.values.device)


def decode(message: Tensor) -> list[Sparse]:
    """The tensors of a message; see `encode`.

    Args:
        message: uint8, zero padding after the message is allowed.

    Raises:
        WireError: the bytes are not a valid message; says what was found.

    Example:
        >>> decode(torch.zeros(20, dtype=torch.uint8))
        Traceback (most recent call last):
        ...
        dgc.errors.WireError: magic is 000000, not 444743: this is not a gradient message ...
    """
    return decode_batch(message).batch.split()


def max_message_bytes(
    numels: Sequence[int],
    counts: Sequence[int],
    value_bits: int,
    device: torch.device | None = None,
) -> int:
    """Bytes that a message of at most `counts` values takes at most, however they are spread.

    Args:
        numels: number of elements of each tensor.
        counts: the most values each can carry.
        value_bits: width of a value code.
        device: where the values are, by default the CPU; a GPU's messages are 1 % larger.

    Example:
        >>> max_message_bytes([25_557_032], [25_558], 4) * 8 / 25_558  # doctest: +ELLIPSIS
        15.4393...
    """
    rice = device is not None and kernels.codes_there(device)
    return max_frame_bytes(numels, counts, value_bits, rice)


def encode_batch(
    batch: SparseBatch,
    value_bits: int,
    *,
    message_bytes: int,
    finite: bool | Tensor = True,
    used: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """One message of fixed size for a bucket.

    A batch with a value that is not finite, or `finite=False`, gives a message without values
    that tells every receiver so. For a batch on a GPU see `assemble.encode_rice`; there what is not
    sent is overwritten with 0 in it.

    Args:
        batch: what to send.
        value_bits: width of a value code.
        message_bytes: size to pad to, from `max_message_bytes` for the device of the batch.
        finite: False if a gradient of the bucket is not finite; or bool `[]` on a GPU.
        used: for each tensor, whether it had a gradient; all by default.

    Returns:
        The message, uint8 `[message_bytes]`, and float32 `[K]` the values as every receiver will
        decode them, bit for bit: what to subtract from the residual. Zeros if not sent.

    Raises:
        ConfigError: `value_bits` or the indices cannot be encoded, or `message_bytes` is too small.

    Example:
        >>> batch = SparseBatch.cat([Sparse(torch.tensor([7]), torch.tensor([-3.0]), 64)])
        >>> message, values = encode_batch(batch, 4, message_bytes=40)
        >>> message.numel(), values.tolist()
        (40, [-3.0])
    """
    check_value_bits(value_bits)
    if kernels.codes_there(batch.values.device) and _check_batch(batch, used):
        return encode_rice(batch, value_bits, message_bytes=message_bytes, finite=finite, used=used)
    data, values, _ = _encode(batch, value_bits, bool(finite), used)
    if len(data) > message_bytes:
        raise ConfigError(f"the message has {len(data)} bytes, message_bytes is {message_bytes}")
    padded = np.zeros(message_bytes, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return _upload(padded, batch.values.device), _upload(values, batch.values.device)


def _encode(
    batch: SparseBatch, value_bits: int, finite: bool, used: Sequence[bool] | None
) -> tuple[bytes, Floats, bool]:
    """Message, decoded values, and whether the message is finite."""
    from dgc.core.kernels import codec_cpu

    count, numels = _check_batch(batch, used), tuple(batch.numels)
    frame = partial(write_frame, numels, value_bits=value_bits, used=used)
    if count == 0 or not finite:
        return frame(0, 0, finite=finite, body=()), np.zeros(count, np.float32), finite
    code = choose_code(sum(numels), count)
    body, values, status = codec_cpu.encode(
        _host(batch.indices, torch.int64),
        _host(batch.values, torch.float32),
        np.array(batch.counts, np.int64),
        _ends(numels),
        code,
        value_bits,
    )
    if status is Status.INDEX:
        raise ConfigError("indices must ascend and lie in [0, numel) of their tensor")
    if status is Status.VALUE:
        return frame(0, 0, finite=False, body=()), np.zeros(count, np.float32), False
    return frame(count, code, finite=True, body=tuple(map(bytes, body))), values, True


def _check_batch(batch: SparseBatch, used: Sequence[bool] | None) -> int:
    """K, if the parts of the batch fit together."""
    sizes = batch.indices.numel(), batch.values.numel(), sum(batch.counts)
    if len(set(sizes)) > 1 or min(batch.counts, default=0) < 0 or min(batch.numels, default=0) < 0:
        raise ConfigError("indices, values and counts hold {}, {} and {}".format(*sizes))
    if not len(batch.counts) == len(batch.numels) == len(batch.counts if used is None else used):
        raise ConfigError(f"{len(batch.counts)} counts for {len(batch.numels)} tensors")
    return sizes[0]


def decode_batch(message: Tensor, numels: Sequence[int] | None = None) -> Message:
    """A message with its flags; see `decode`.

    Args:
        message: uint8, zero padding after the message is allowed.
        numels: the tensors that the message must be for; any by default.

    Raises:
        WireError: the bytes are not a valid message, or not one for tensors of `numels`.
    """
    wanted = None if numels is None else tuple(numels)
    header, positions, values, counts = _decode(_bytes(message), wanted)
    indices = positions - np.repeat(_starts(header.numels), counts)
    batch = SparseBatch(
        torch.from_numpy(indices).to(message.device),
        torch.from_numpy(values).to(message.device),
        tuple(counts.tolist()),
        header.numels,
    )
    return Message(batch, header.finite, header.used)


def set_mean_(
    messages: Sequence[Tensor] | Tensor, grads: Sequence[Tensor], scale: float | Sequence[float]
) -> list[Header]:
    """Set dense gradients to `scale` × the sum of the messages' values; overwrites `grads`.

    Messages are added in their order, in one pass over the memory.

    Args:
        messages: uint8, each made for tensors with the numels of `grads`; or `[P, bytes]`.
        grads: contiguous float32, of any shape.
        scale: one factor, or one for each tensor.

    Returns:
        The headers. A message that is not finite adds nothing.

    Raises:
        WireError: one is not a valid message for `grads`, which are then left as they were.

    Example:
        >>> message = encode([Sparse(torch.tensor([1]), torch.tensor([6.0]), 3)], 32)
        >>> grad = torch.ones(3)
        >>> len(set_mean_([message, message], [grad], 0.5)), grad.tolist()
        (2, [0.0, 6.0, 0.0])
    """
    from dgc.core.kernels import codec_cpu

    if isinstance(messages, Tensor):
        messages = messages.cpu()  # in one copy
    check_dense(grads)
    numels = tuple(grad.numel() for grad in grads)
    scales = np.empty(len(grads), np.float32)
    scales[:] = scale
    host = [_bytes(message) for message in messages]
    decoded = codec_cpu.each(lambda message: _decode(message, numels), host)
    if not grads or (grads[0].device.type == "cpu" and not kernels.codes_there(grads[0].device)):
        positions = np.concatenate([np.zeros(0, np.int64), *(each.positions for each in decoded)])
        values = np.concatenate([np.zeros(0, np.float32), *(each.values for each in decoded)])
        edges = np.cumsum([0, *(len(each.positions) for each in decoded)])
        codec_cpu.set_mean_(positions, values, edges, _ends(numels), grads, scales)
    else:
        _set_on_device_(decoded, grads, scales)
    return [each.header for each in decoded]


def _set_on_device_(decoded: Sequence["_Decoded"], grads: Sequence[Tensor], scales: Floats) -> None:
    torch._foreach_zero_(list(grads))
    counts, device = [len(each.positions) for each in decoded], grads[0].device
    if sum(counts):
        positions = _upload(np.concatenate([each.positions for each in decoded]), device)
        values = _upload(np.concatenate([each.values for each in decoded]), device)
        numbers, factors = _upload(np.array(counts), device), scales.tolist()
        runs = positions.split(counts), values.split(counts)
        kernels.scatter_add_(grads, *runs, numbers, factors)


def check_dense(grads: Sequence[Tensor]) -> None:
    """Refuse gradients that are not contiguous float32."""
    for grad in grads:
        if grad.dtype is not torch.float32 or not grad.is_contiguous():
            raise ConfigError(
                f"a gradient is {grad.dtype} with strides {grad.stride()}: give contiguous float32"
            )


def _host(tensor: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    return tensor.detach().to("cpu", dtype).contiguous().numpy()


def _upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """`array` on `device`; the host does not wait for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _bytes(message: Tensor) -> Bytes:
    if message.dtype is not torch.uint8 or message.dim() != 1:
        raise WireError(f"a message is uint8 [bytes], not {message.dtype} {list(message.shape)}")
    return _host(message, torch.uint8)


def _ends(numels: Sequence[int]) -> Ints:
    return np.cumsum(np.array(numels, np.int64))


def _starts(numels: Sequence[int]) -> Ints:
    return _ends(numels) - np.array(numels, np.int64)


class _Decoded(NamedTuple):
    """A checked message: positions and values `[K]`, counts `[T]`."""

    header: Header
    positions: Ints
    values: Floats
    counts: Ints


def _decode(message: Bytes, numels: tuple[int, ...] | None) -> _Decoded:
    from dgc.core.kernels import codec_cpu

    header, at = read_frame(message, numels)
    count, ends = header.num_values, _ends(header.numels)
    if count == 0:
        return _Decoded(header, np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros_like(ends))
    body = Body(*(message[begin:end] for begin, end in pairwise(at)))
    positions, values, counts, status = codec_cpu.decode(
        body, count, ends, header.code, header.value_bits, header.rice
    )
    if status is not Status.OK:
        raise WireError(f"{FINDINGS[status]}: the encoder that wrote it is at fault")
    return _Decoded(header, positions, values, counts)
