"""Saving all ranks' states, and making them fit another number of ranks.

Residuals differ per rank, so every rank's state has keys of its own in torch.distributed.checkpoint,
and all that is written is tensors: numbers and strings travel as JSON in a uint8 tensor, so no file
holds pickled code.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dgc.comm.base import Communicator
from dgc.errors import ConfigError, StateError
from dgc.train.state import STATE_VERSION

_META = "meta"


class Stateful(Protocol):
    """`DistributedOptimizer`, or what `register` returned."""

    comm: Communicator

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def rows_for(rank: int, old_size: int, new_size: int) -> range:
    """The old ranks whose memories rank `rank` of `new_size` takes over.

    Example:
        >>> [list(rows_for(rank, 4, 2)) for rank in range(2)]
        [[0, 2], [1, 3]]
    """
    return range(rank, old_size, new_size)


def resize(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The state of `rank` in a world of `world_size`, from those of a world of another size.

        v' = (W'/W) · Σ rows read,   so that   Σ v' / W' = Σ v / W

    and the same for u: what the mean gradient still has to receive stays as it was. Adam's second
    moments, which differ little among ranks, are those of rank 0.

    Args:
        states: the states of the old ranks, in any order: all of them, or at least rank 0's and
            those of `rows_for(rank, ...)`.
        rank: of the new world.
        world_size: W', of the new world.

    Returns:
        A state for `load_state_dict`; tensors are new.

    Raises:
        StateError: a state is missing, of another version, or of another world than the first.

    Example:
        >>> old = [{"version": 3, "rank": r, "world_size": 2, "step": 5,
        ...         "memory": {"w": {"v": torch.tensor([1.0 + r])}}} for r in range(2)]
        >>> resize(old, 0, 1)["memory"]["w"]["v"].tolist()
        [1.5]
    """
    by_rank = _by_rank(states)
    first = by_rank[min(by_rank)]
    old_size = first["world_size"]
    rows = rows_for(rank, old_size, world_size)
    missing = [row for row in (0, *rows) if row not in by_rank]
    if missing:
        raise StateError(
            f"rank {rank} of {world_size} needs the state of rank {missing[0]} of {old_size}, given "
            f"are {sorted(by_rank)}: give the states of all ranks"
        )
    zeros = _scaled([by_rank[0]["memory"]], 0.0)
    factor = world_size / old_size
    if "step" in str(first.get("unit")):  # Adam applies the root of the world's size times the mean
        factor = math.sqrt(factor)
    memory = _scaled([by_rank[row]["memory"] for row in rows], factor)
    return {**by_rank[0], "rank": rank, "world_size": world_size, "memory": memory or zeros}


def _by_rank(states: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    if not states:
        raise StateError("there is no state to resize: give those of all ranks")
    for state in states:
        for key, wanted in (
            ("version", STATE_VERSION),
            ("world_size", states[0].get("world_size")),
            ("step", states[0].get("step")),
        ):
            if key not in state or state[key] != wanted:
                raise StateError(
                    f"the state of rank {state.get('rank')} has {key} {state.get(key)}, "
                    f"wanted is {wanted}: give the states that all ranks wrote in one step"
                )
    return {state["rank"]: state for state in states}


def _scaled(memories: Sequence[Mapping[str, Any]], factor: float) -> dict[str, Any]:
    """factor · Σ memories, tensor by tensor, summed in float32; empty if there is none."""
    if not memories:
        return {}
    return {
        name: {
            key: (sum(each[name][key].float() for each in memories) * factor).to(tensor.dtype)
            for key, tensor in tensors.items()
        }
        for name, tensors in memories[0].items()
    }


def save(stateful: Stateful, path: str | PathLike[str]) -> None:
    """Write the states of all ranks with torch.distributed.checkpoint; every rank calls it.

    Args:
        stateful: `DistributedOptimizer`, or what `register` returned.
        path: a folder that all ranks can write to, for this alone. A new one for each save: what is
            written over is lost if the job ends meanwhile.

    Raises:
        ConfigError: torch.distributed is not initialised and there are several ranks, or another
            checkpoint is in `path`.
    """
    comm = stateful.comm
    _check_distributed(comm)
    _refuse_another(path, comm)
    own = {f"{_prefix(comm.rank)}{k}": t for k, t in to_tensors(stateful.state_dict()).items()}
    with _alone_is_meant(comm):
        state_dict_saver.save(own, checkpoint_id=path, no_dist=comm.world_size == 1)


def load(stateful: Stateful, path: str | PathLike[str]) -> None:
    """Read what `save` wrote, on the same or another number of ranks; every rank calls it.

    On the same number training goes on bit for bit; on another one the mass of the residuals is
    kept, see `resize`.

    Raises:
        StateError: it holds no state of dgc, one of another model or version, or of several steps.
    """
    comm = stateful.comm
    _check_distributed(comm)
    reader = FileSystemReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    old_size = sum(f"{_prefix(rank)}{_META}" in metadata for rank in range(len(metadata)))
    if not old_size:
        raise StateError(f"{path} holds no state of dgc: its keys are {sorted(metadata)[:8]}")
    wanted = {0, *rows_for(comm.rank, old_size, comm.world_size)}
    tensors = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in metadata.items()
        for rank in wanted
        if key.startswith(_prefix(rank)) and isinstance(item, TensorStorageMetadata)
    }
    with _alone_is_meant(comm):
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=comm.world_size == 1)
    states = [_part(tensors, _prefix(rank)) for rank in sorted(wanted)]
    own = torch.tensor([int(state["step"]) for state in states])
    steps = _everywhere(torch.stack(own.aminmax()), comm).unique().tolist()
    if len(steps) > 1:
        raise StateError(
            f"{path} has ranks at steps {steps}: a save was interrupted. Take an earlier one, and a new "
            "folder for each save"
        )
    if old_size == comm.world_size:
        stateful.load_state_dict(next(s for s in states if s["rank"] == comm.rank))
    else:
        stateful.load_state_dict(resize(states, comm.rank, comm.world_size))


@contextmanager
def _alone_is_meant(comm: Communicator) -> Iterator[None]:
    """Without torch's warning to a world of one that it is a world of one."""
    with warnings.catch_warnings():
        if comm.world_size == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _prefix(rank: int) -> str:
    return f"dgc/rank{rank}/"


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return from_tensors(
        {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    )


def _refuse_another(path: str | PathLike[str], comm: Communicator) -> None:
    """Torch writes over a checkpoint that lies there, whatever it is of."""
    found = False
    if Path(path, ".metadata").exists():
        keys = FileSystemReader(path).read_metadata().state_dict_metadata
        found = not all(key.startswith("dgc/rank") for key in keys)
    if _everywhere(torch.tensor([int(found)]), comm).any():  # shared folders may be seen late
        raise ConfigError(f"{path} holds another checkpoint: give a folder of its own")


def _everywhere(values: Tensor, comm: Communicator) -> Tensor:
    return comm.all_gather(values.to(comm.device)).wait().cpu()


def _check_distributed(comm: Communicator) -> None:
    if comm.world_size > 1 and not dist.is_initialized():
        raise ConfigError(
            "torch.distributed.checkpoint needs an initialised torch.distributed process group: "
            "save state_dict() of each rank with torch.save instead"
        )
    if dist.is_initialized() and dist.get_world_size() != comm.world_size:
        raise ConfigError(
            f"{comm.world_size} of the job's {dist.get_world_size()} ranks exchange gradients with "
            "this one, and the others would write the same keys: save state_dict() of each rank "
            "with torch.save instead"
        )


def to_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state as tensors alone: each tensor by its path, and `meta`, the rest as JSON.

    Example:
        >>> from_tensors(to_tensors({"step": 3, "memory": {"w": torch.ones(1)}}))
        {'step': 3, 'memory': {'w': tensor([1.])}}
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_skeleton(state, "state", tensors))
    return {**tensors, _META: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def _skeleton(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON: ["t", path] a tensor, ["d", pairs] a dict, ["l", items], ["v", other]."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return ["t", path]
    if isinstance(value, Mapping):
        return ["d", [[k, _skeleton(v, f"{path}/{k}", tensors)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return ["l", [_skeleton(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["v", value]
    raise ConfigError(f"{path} is a {type(value).__name__}: only numbers and strings can be saved")


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `to_tensors` was given.

    Raises:
        StateError: `meta` is missing or names a tensor that is not there.
    """
    try:
        text = bytes(tensors[_META].tolist()).decode()
        state: dict[str, Any] = _revive(json.loads(text), tensors)
    except (KeyError, ValueError, TypeError) as error:
        raise StateError(f"this is not a state of dgc: {type(error).__name__} {error}") from error
    return state


def _revive(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, content = node
    if kind == "t":
        return tensors[content]
    if kind == "d":
        return {key: _revive(each, tensors) for key, each in content}
    return [_revive(each, tensors) for each in content] if kind == "l" else content
