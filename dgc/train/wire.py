"""Gradient messages: the byte layout of docs/wire.md.

A message is checked in full, checksum, sizes, every index and every value, before anything is
returned or added: any bytes give the right answer or a `WireError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgc.core.kernels import codec_reference as codec
from dgc.core.kernels.codec_reference import Body, Status
from dgc.core.pack import choose_code
from dgc.core.quantize import check_value_bits
from dgc.core.sparse import Sparse, SparseBatch
from dgc.errors import ConfigError, GradientError, WireError
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
        dgc.errors.WireError: magic is 000000, not 444743: this is not a gradient message
    """
    return decode_batch(message).batch.split()


def max_message_bytes(numels: Sequence[int], counts: Sequence[int], value_bits: int) -> int:
    """Bytes that a message of at most `counts` values takes at most, however they are spread.

    Args:
        numels: number of elements of each tensor.
        counts: the most values each can carry.
        value_bits: width of a value code.

    Example:
        >>> max_message_bytes([25_557_032], [25_558], 4) * 8 / 25_558  # doctest: +ELLIPSIS
        15.4393...
    """
    return max_frame_bytes(numels, counts, value_bits)


def encode_batch(
    batch: SparseBatch,
    value_bits: int,
    *,
    message_bytes: int,
    finite: bool = True,
    used: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """One message of fixed size for a bucket.

    A batch with a value that is not finite, or `finite=False`, gives a message without values
    that tells every receiver so.

    Args:
        batch: what to send.
        value_bits: width of a value code.
        message_bytes: size to pad to, from `max_message_bytes`.
        finite: False if a gradient of the bucket is not finite.
        used: for each tensor, whether it had a gradient; all by default.

    Returns:
        The message, uint8 `[message_bytes]`, and float32 `[K]` the values as every receiver will
        decode them, bit for bit: what to subtract from the residual. Zeros if not finite.

    Raises:
        ConfigError: `value_bits` or the indices cannot be encoded, or `message_bytes` is too small.

    Example:
        >>> batch = SparseBatch.cat([Sparse(torch.tensor([7]), torch.tensor([-3.0]), 64)])
        >>> message, values = encode_batch(batch, 4, message_bytes=40)
        >>> message.numel(), values.tolist()
        (40, [-3.0])
    """
    data, values, _ = _encode(batch, check_value_bits(value_bits), finite, used)
    if len(data) > message_bytes:
        raise ConfigError(f"the message has {len(data)} bytes, message_bytes is {message_bytes}")
    padded = np.zeros(message_bytes, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    device = batch.values.device
    return torch.from_numpy(padded).to(device), torch.from_numpy(values).to(device)


def _encode(
    batch: SparseBatch, value_bits: int, finite: bool, used: Sequence[bool] | None
) -> tuple[bytes, npt.NDArray[np.float32], bool]:
    """Message, decoded values, and whether the message is finite."""
    count, numels = batch.indices.numel(), tuple(batch.numels)
    code = choose_code(sum(numels), count) if count else 0
    body, values, status = codec.encode(
        _host(batch.indices, torch.int64),
        _host(batch.values, torch.float32),
        np.array(batch.counts, np.int64),
        _ends(numels),
        code,
        value_bits,
    )
    if status is Status.INDEX:
        raise ConfigError("indices must ascend and lie in [0, numel) of their tensor")
    finite = finite and status is Status.OK
    if not finite or not count:
        empty = write_frame(numels, 0, 0, value_bits, finite=finite, used=used, body=())
        return empty, np.zeros(count, np.float32), finite
    message = write_frame(
        numels, count, code, value_bits, finite=True, used=used, body=tuple(map(bytes, body))
    )
    return message, values, True


def decode_batch(message: Tensor, numels: Sequence[int] | None = None) -> Message:
    """A message with its flags; see `decode`.

    Args:
        message: uint8, zero padding after the message is allowed.
        numels: the tensors that the message must be for; any by default.

    Raises:
        WireError: the bytes are not a valid message, or not one for tensors of `numels`.
    """
    header, positions, values, counts = _decode(_host(message, torch.uint8), numels)
    starts = np.concatenate([[0], _ends(header.numels)[:-1]]).astype(np.int64)
    indices = positions - np.repeat(starts[: len(counts)], counts)
    batch = SparseBatch(
        torch.from_numpy(indices).to(message.device),
        torch.from_numpy(values).to(message.device),
        tuple(counts.tolist()),
        header.numels,
    )
    return Message(batch, header.finite, header.used)


def add_mean_(message: Tensor, grads: Sequence[Tensor], scale: float | Sequence[float]) -> Header:
    """Add `scale` × the values of a message to dense gradients; overwrites `grads`.

    Args:
        message: uint8, made for tensors with the numels of `grads`.
        grads: contiguous float32, of any shape.
        scale: one factor, or one for each tensor.

    Returns:
        The header. A message that is not finite adds nothing.

    Raises:
        WireError: not a valid message for `grads`, which are then left as they were.

    Example:
        >>> message = encode([Sparse(torch.tensor([1]), torch.tensor([6.0]), 3)], 32)
        >>> grad = torch.ones(3)
        >>> add_mean_(message, [grad], 0.5).num_values, grad.tolist()
        (1, [1.0, 4.0, 1.0])
    """
    scales = [scale] * len(grads) if isinstance(scale, int | float) else list(scale)
    for grad in grads:
        if grad.dtype is not torch.float32 or not grad.is_contiguous():
            raise ConfigError(
                f"gradient is {grad.dtype}, stride {grad.stride()}: give contiguous float32"
            )
    numels = [grad.numel() for grad in grads]
    header, positions, values, counts = _decode(_host(message, torch.uint8), numels)
    first = 0
    ends = _ends(header.numels)
    for grad, factor, count, numel, end in zip(grads, scales, counts, numels, ends, strict=True):
        run = slice(first, first + int(count))
        where = torch.from_numpy(positions[run] - (end - numel)).to(grad.device)
        what = torch.from_numpy(values[run] * np.float32(factor)).to(grad.device)
        grad.view(-1).index_add_(0, where, what)
        first += int(count)
    return header


def _host(tensor: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    return tensor.detach().to("cpu", dtype).contiguous().numpy()


def _ends(numels: Sequence[int]) -> Ints:
    return np.cumsum(np.array(numels, np.int64))


def _decode(message: Bytes, numels: Sequence[int] | None) -> tuple[Header, Ints, Floats, Ints]:
    """Header, positions `[K]`, values `[K]` and counts `[T]`, everything checked."""
    header, at = read_frame(message, None if numels is None else tuple(numels))
    count, ends = header.num_values, _ends(header.numels)
    if count == 0:
        zeros = np.zeros(len(ends), np.int64)
        return header, np.zeros(0, np.int64), np.zeros(0, np.float32), zeros
    body = Body(*(message[begin:end] for begin, end in pairwise(at)))
    positions, values, counts, status = codec.decode(
        body, count, ends, header.code, header.value_bits
    )
    if status is not Status.OK:
        raise WireError(f"{FINDINGS[status]}: the sender's encoder is at fault")
    return header, positions, values, counts
