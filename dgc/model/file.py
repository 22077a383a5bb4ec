"""A model ↔ one small file: `save`, `load`, `export`. The bytes are described in docs/file.md."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dgc.errors import ConfigError, FileError, StateError
from dgc.model import container, report
from dgc.model.bytes import Reader
from dgc.model.codes import to_layer
from dgc.model.constrain import bind_root, constrained, refuse_sharded, release, weights_of
from dgc.model.container import CODED, Entry
from dgc.model.layer import CODERS, Decoder, Head, Layer, encode_layers, read_head
from dgc.model.prune import Mask
from dgc.model.share import Shared

MAX_EXPANSION = 4096
"""Without a model to compare with, a file may decode to this many times its own bytes, or to
`FREE_BYTES` if that is more."""
FREE_BYTES = 1 << 26

State = dict[str, Tensor]


def save(
    model: nn.Module, path: str | Path, *, coder: str = "ans", half: bool = False
) -> report.Report:
    """Write `model` as one compressed file and say what every byte of it is for.

    Floating tensors of few distinct values, at most 255 besides zero (see `share`), are coded as
    symbols, zero being one more; others of which a tenth or more is zero as places and values; the
    rest, such as biases, norms and buffers, are stored as they are. Nothing is rounded unless `half`;
    a zero in a coded tensor loses its sign.

    Args:
        model: its `state_dict` is saved; it is not changed, but for pruned or shared weights that
            an unusual optimizer moved, which are first put back in place.
        path: written to a sibling that is then renamed; links are followed, devices and pipes
            written to as they are.
        coder: `"ans"`, or `"huffman"` as in the paper (larger).
        half: store codebooks and all that is not coded, as biases, norms, floating buffers and weights
            of many values, in 16 bits where it is float32; what is not coded only in a model without
            float16 tensors of its own.

    Returns:
        A table, to print; `.file_bytes` is the size of the file.

    Raises:
        ConfigError: if the coder is unknown, the path a folder or in none, or the model's state holds
            what a file cannot.

    Example:
        >>> import tempfile, dgc.model
        >>> model = dgc.model.share(dgc.model.prune(nn.Linear(100, 50), density=0.1), bits=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save(model, f"{folder}/small.dgc")
        ...     assert report.file_bytes == Path(f"{folder}/small.dgc").stat().st_size
        ...     twin = load(nn.Linear(100, 50), f"{folder}/small.dgc")
        >>> torch.equal(twin(torch.ones(100)), model(torch.ones(100)))
        True
    """
    return save_state(plain_state(model), path, coder=coder, half=half)


def plain_state(model: nn.Module) -> State:
    """`model.state_dict()` without the buffers of masks and codes."""
    own = {id(c.buffer(module)) for module, c in constrained(model)}
    hidden = {n for n, b in model.named_buffers(remove_duplicate=False) if id(b) in own}
    # By identity too: wrappers, as for checkpointing of activations, give a state other names.
    state = model.state_dict(keep_vars=True)
    return {
        name: _detached(value)
        for name, value in state.items()
        if name not in hidden and id(value) not in own
    }


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value  # extra state may be anything


def save_state(
    state: Mapping[str, Tensor], path: str | Path, *, coder: str = "ans", half: bool = False
) -> report.Report:
    """`save`, of a state dict."""
    if coder not in CODERS:
        raise ConfigError(f"coder is {coder!r}: one of {sorted(CODERS)}")
    container.check_target(path)
    named, tied = _untie(checked(state))
    own = {name: tensor.detach().cpu() for name, tensor in named.items()}
    layers = {name: layer for name, t in own.items() if (layer := to_layer(t, half)) is not None}
    records = dict(zip(layers, encode_layers(list(layers.values()), coder), strict=True))
    widen = half and not any(t.dtype == torch.float16 for t in own.values())
    entries = {n: _plain(t, widen) for n, t in own.items() if n not in layers}
    entries |= {n + CODED: Entry("U8", (len(r),), r) for n, r in records.items()}
    metadata = {"tied": json.dumps(tied, separators=(",", ":"))} if tied else {}
    if any(e.dtype == "F16" for e in entries.values()) and widen:
        metadata["widen"] = "F32"
    raw = container.pack(entries, metadata)
    container.write_file(path, raw)
    return _report(own, layers, entries, len(raw))


def _report(
    own: State, layers: dict[str, Layer], entries: dict[str, Entry], file_bytes: int
) -> report.Report:
    rows = tuple(
        report.layer_row(n, layers[n], entries[n + CODED].data)
        if n in layers
        else report.plain_row(n, t, len(entries[n].data))
        for n, t in own.items()
    )
    return report.Report(rows, file_bytes - sum(row.file_bytes for row in rows), file_bytes)


def checked(state: Mapping[str, Tensor]) -> State:
    """`state` as a dict; a `ConfigError` if a file cannot hold it."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dtype not in container.DTYPE_NAMES:
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{name!r} is {what}: a file holds tensors of {_dtype_names()}")
        refuse_sharded(value, name)
        if value.is_meta:
            raise ConfigError(
                f"{name!r} is on the device meta, without values: load the weights first, or to load a "
                "file into it give it memory by model.to_empty"
            )
        if value.dim() > container.MAX_DIMENSIONS:
            raise ConfigError(
                f"{name!r} has {value.dim()} dimensions: at most {container.MAX_DIMENSIONS}"
            )
        too_large = container.span(value.shape) >= container.MAX_NUMEL
        strided = value.layout == torch.strided and not is_traceable_wrapper_subclass(value)
        if not strided or too_large or name.endswith(CODED) or name == "__metadata__":
            raise ConfigError(f"{name!r} cannot be saved: give dense tensors, no name in {CODED!r}")
    return dict(state)


def _dtype_names() -> str:
    return ", ".join(sorted(container.DTYPES))


def _untie(state: State) -> tuple[State, dict[str, str]]:
    """Each tensor once, and for the other names which of those they share."""
    first: dict[object, str] = {}
    own, tied = State(), dict[str, str]()
    for name, t in state.items():
        key = (t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else name
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            own[name] = t
    return own, tied


def _plain(tensor: Tensor, widen: bool) -> Entry:
    if widen and tensor.dtype == torch.float32 and bool(tensor.half().isfinite().all()):
        tensor = tensor.half()
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Entry(container.DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A file whose container is checked and whose sizes are known; nothing is decoded yet."""

    entries: dict[str, Entry]
    heads: dict[str, Head]
    tied: dict[str, str]
    widen: bool
    file_bytes: int

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, tied names included, before anything is decoded."""
        known = {n: (h.shape, h.dtype) for n, h in self.heads.items()}
        for name, entry in self.entries.items():
            if not name.endswith(CODED):
                known[name] = (entry.shape, self._dtype(entry))
        return known | {name: known[other] for name, other in self.tied.items()}

    def _dtype(self, entry: Entry) -> torch.dtype:
        stored = container.DTYPES[entry.dtype]
        return torch.float32 if self.widen and stored == torch.float16 else stored

    def decode(self) -> tuple[State, dict[str, Layer]]:
        """Every tensor by name, tied names sharing one, and the layers that were coded."""
        decoder, state, layers = Decoder(), State(), dict[str, Layer]()
        for name, entry in self.entries.items():
            if name.endswith(CODED):
                own = name.removesuffix(CODED)
                layers[own] = decoder.layer(entry.data)
                state[own] = layers[own].weight()
            else:
                stored = container.DTYPES[entry.dtype]
                flat = torch.empty(0, dtype=stored)
                if entry.data:
                    flat = torch.frombuffer(bytearray(entry.data), dtype=stored)
                state[name] = flat.view(entry.shape).to(self._dtype(entry))
        return state | {name: state[other] for name, other in self.tied.items()}, layers


def open_file(path: str | Path) -> Opened:
    """Read and check a file's container and the sizes in it.

    Raises:
        FileError: if it is not a compressed model.
    """
    return parse(Path(path).read_bytes())


def parse(raw: bytes) -> Opened:
    """`open_file`, of bytes."""
    entries, metadata = container.unpack(raw)
    heads = {
        name.removesuffix(CODED): read_head(Reader(entry.data))
        for name, entry in entries.items()
        if name.endswith(CODED)
    }
    names = set(heads) | {name for name in entries if not name.endswith(CODED)}
    if len(names) != len(entries) or metadata.get("widen", "F32") != "F32":
        raise FileError("a tensor is stored twice, or as is unknown: the file is damaged")
    return Opened(entries, heads, _tied(metadata, names), "widen" in metadata, len(raw))


def _tied(metadata: dict[str, str], names: set[str]) -> dict[str, str]:
    tied = container.read_json(metadata.get("tied", "{}"), "list of tied names")
    taken = names | {"__metadata__"}
    valid = isinstance(tied, dict) and not any(n in taken or n.endswith(CODED) for n in tied)
    if not valid or not all(isinstance(o, str) and o in names for o in tied.values()):
        raise FileError("a tied name refers to no tensor: the file is damaged")
    return dict(tied)


def load(model: nn.Module, path: str | Path, *, constrain: bool = False) -> nn.Module:
    """Set `model` to what `save` wrote: the same weights, bit for bit (with `half`, as rounded).

    Args:
        model: of the class that was saved; overwritten, its masks and shared values lifted.
        path: the file. Nothing in it is executed, and what is allocated goes by `model`'s own size.
        constrain: hold the zeros and shared values of the file's weights from now on, to train further:
            those of `dgc.model.weights_of` that are coded (see `save`), so not weights of less than 64
            elements, or with fewer zeros.

    Returns:
        `model`.

    Raises:
        FileError: if the bytes are not a valid file.
        StateError: if it is another model's: the difference is named and `model` is unchanged.
        ConfigError: if `model` has no memory (on the device `meta`), is sharded, or has a state that
            no file can hold; it is unchanged too.
    """
    opened = open_file(path)
    _match(opened, checked(plain_state(model)), path)
    state, layers = opened.decode()
    for name, other in _untie(plain_state(model))[1].items():
        if state[name] is not state[other] and not torch.equal(state[name], state[other]):
            raise StateError(
                f"{path} holds another model: here {name!r} and {other!r} are one tensor"
            )
    release(model)
    current = model.state_dict()  # which says what versions its modules have: nothing is converted
    current.update(state)
    model.load_state_dict(current, strict=True)
    if constrain:
        _constrain(model, layers)
    return model


def _match(opened: Opened, target: State, path: str | Path) -> None:
    found = opened.shapes()
    wanted = {n: (tuple(t.shape), t.dtype) for n, t in target.items()}
    lines = [f"{n!r} is in the file only" for n in found if n not in wanted]
    lines += [f"{n!r} is in the model only" for n in wanted if n not in found]
    lines += [
        f"{n!r} is {found[n][0]} {found[n][1]} in the file, {wanted[n][0]} {wanted[n][1]} in the model"
        for n in wanted
        if n in found and found[n] != wanted[n]
    ]
    if lines:
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise StateError(f"{path} holds another model: {'; '.join(lines[:5])}{more}")


def _constrain(model: nn.Module, layers: dict[str, Layer]) -> None:
    # Of a bias or buffer a file cannot say whether it was pruned or is small by chance.
    named = weights_of(model)
    weights = {id(m.get_parameter(own)): (m, own) for m, own in named.values()}
    for name, value in model.state_dict(keep_vars=True).items():
        found = weights.get(id(value)) or named.get(name)
        if name not in layers or found is None:
            continue
        layer, (module, own) = layers[name], found
        codes = layer.codes.to(module.get_parameter(own).device)
        if layer.literal:
            Mask(own).install(module, codes != 0)
        else:
            Shared(own).install(module, codes)
    bind_root(model)


def read_state(path: str | Path, *, max_bytes: int | None = None) -> State:
    """The state dict in a file, without a model at hand.

    Args:
        max_bytes: refuse to decode more than this; by default `MAX_EXPANSION` times the file, or
            64 MiB if that is more.

    Raises:
        FileError: if the bytes are not a valid file, or would decode to more.
    """
    opened = open_file(path)
    check_size(opened, max_bytes)
    return opened.decode()[0]


def check_size(opened: Opened, max_bytes: int | None = None) -> None:
    """Refuse a file that claims more than `max_bytes`, before anything of it is decoded."""
    limit = max(FREE_BYTES, MAX_EXPANSION * opened.file_bytes) if max_bytes is None else max_bytes
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in opened.shapes().values())
    if total > limit:
        raise FileError(
            f"decodes to {total} bytes, the limit is {limit}: load it into a model, or raise that by "
            "dgc.model.read_state(path, max_bytes=...)"
        )


def inspect(path: str | Path) -> tuple[report.Report, dict[str, Layer]]:
    """The table that `save` returned, read off a file, and its coded layers."""
    opened = open_file(path)
    check_size(opened)
    state, layers = opened.decode()
    own = {name: tensor for name, tensor in state.items() if name not in opened.tied}
    return _report(own, layers, opened.entries, opened.file_bytes), layers


def export(path: str | Path, out: str | Path, *, max_bytes: int | None = None) -> None:
    """Turn a compressed file into a plain safetensors state dict, same values bit for bit.

    Args:
        path: what `save` wrote.
        out: written as by `save`. Tied tensors are written once a name.
        max_bytes: as in `read_state`.
    """
    from safetensors.torch import save as to_bytes

    container.check_target(out)
    state = {n: t.clone().contiguous() for n, t in read_state(path, max_bytes=max_bytes).items()}
    container.write_file(out, to_bytes(state))
