"""At construction: are the parameters named well, and do all ranks hold the same ones?"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dgc.comm.base import Communicator
from dgc.errors import ConfigError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def named_parameters_of(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Parameter]]
) -> dict[str, Parameter]:
    """The parameters that `optimizer` trains, by name, tied weights once.

    Raises:
        ConfigError: a name twice, a parameter of the optimizer without a name, or a dtype that
            cannot be exchanged.
    """
    names: dict[Parameter, str] = {}
    seen: set[str] = set()
    for name, param in named_parameters:
        if name in seen and names.get(param) != name:
            raise ConfigError(f"named_parameters has the name {name!r} twice: names must be unique")
        seen.add(name)
        names.setdefault(param, name)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nameless = [p for p in trained if p not in names]
    if nameless:
        raise ConfigError(
            f"{len(nameless)} parameters of the optimizer are not in named_parameters, the first of "
            f"shape {tuple(nameless[0].shape)}: pass model.named_parameters() of the same model"
        )
    wanted = {p for p in trained if p.requires_grad}
    params = {name: p for p, name in names.items() if p in wanted}
    if not params:
        raise ConfigError("the optimizer has no parameter that requires a gradient: nothing to do")
    for name, param in params.items():
        if param.dtype not in _DTYPES:
            raise ConfigError(f"{name} is {param.dtype}: only {_DTYPES} can be exchanged")
    return params


def check_agreement(params: Mapping[str, Tensor], config: str, comm: Communicator) -> None:
    """Compare digests among ranks.

    Raises:
        ConfigError: on every rank, if ranks differ in configuration or parameters; it names the
            first difference.
    """
    lines = [_line(name, param).encode() for name, param in params.items()]
    digests = [_digest(config.encode()), _digest(b"\n".join(lines)), *map(_digest, lines)]
    heads = _gather(torch.cat([*digests[:2], torch.tensor([len(lines)])]), comm)
    if bool((heads[:, 0] != heads[0, 0]).any()):
        raise ConfigError(f"ranks were given different configurations; this rank's is:\n{config}")
    if not bool((heads[:, 1:] != heads[0, 1:]).any()):
        return
    table = torch.zeros(int(heads[:, 2].max()), dtype=torch.int64)
    table[: len(lines)] = torch.cat(digests[2:])
    tables = _gather(table, comm)
    differs = (tables != tables[0]).any(dim=0)
    first = int(differs.nonzero()[0])
    here = lines[first].decode() if first < len(lines) else "missing"
    raise ConfigError(
        f"ranks hold different models: parameter number {first} differs; on this rank "
        f"({comm.rank}) it is: {here}. Build the same model on every rank"
    )


def _line(name: str, param: Tensor) -> str:
    """Of ranks on CPUs and on GPUs the messages differ in size."""
    frozen = "" if param.requires_grad else " frozen"
    return f"{name} {tuple(param.shape)} {param.dtype} on {param.device.type}{frozen}"


def _digest(text: bytes) -> Tensor:
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)
    return torch.tensor([number], dtype=torch.int64)


def _gather(row: Tensor, comm: Communicator) -> Tensor:
    return comm.all_gather(row.to(comm.device)).wait().cpu()
