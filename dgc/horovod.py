"""For scripts that use Horovod: `import dgc.horovod as hvd` in place of `import horovod.torch as hvd`.

Everything of horovod.torch is here under its own name; `DistributedOptimizer` compresses, and what
cannot work with compression is refused by name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import environ
from typing import Any, NoReturn

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from dgc.comm.base import Communicator, SelfCommunicator
from dgc.comm.horovod import HorovodCommunicator, import_horovod
from dgc.config import Compression as _Compression
from dgc.config import Dense
from dgc.errors import ConfigError, GradientError, StateError
from dgc.train.optimizer import DistributedOptimizer as _DistributedOptimizer


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # Python and its tools ask modules for many such
        raise AttributeError(name)
    return getattr(import_horovod(), name)


class DistributedOptimizer(_DistributedOptimizer):
    """`horovod.torch.DistributedOptimizer`, compressed: the same arguments, the same methods.

    The mean over ranks of Σ over the backward passes of a step, as Horovod's; see
    `dgc.DistributedOptimizer` for what momentum, weight decay and the state are.

    Args:
        optimizer: the optimizer to wrap, not Horovod's wrapper of it.
        named_parameters: `model.named_parameters()`; by default parameters are named by position.
        compression: `dgc.DGC(...)` (the default) or `dgc.Dense(...)`.
        backward_passes_per_step: backward passes whose gradients are added up before a step, >= 1.
        op: `hvd.Average` only.
        gradient_predivide_factor: 1.0 only.
        num_groups, groups: none; buckets are planned by `compression.bucket_bytes`.
        sparse_as_dense: False only.
        process_set: the ranks that train together; None is all. A rank outside of it trains alone.
        scaler: the `torch.amp.GradScaler` of the training loop, if it has one.
        timeout_seconds: how long a collective may take before `CommError`.

    Raises:
        ConfigError: a value that is not supported, or `hvd.init()` was not called.
        MissingPackageError: Horovod is not installed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Parameter]] | None = None,
        compression: _Compression | None = None,
        backward_passes_per_step: int = 1,
        op: Any = None,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: Any = None,
        sparse_as_dense: bool = False,
        process_set: Any = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        hvd = import_horovod()
        _refuse_optimizer(optimizer)
        _refuse_compression(compression)
        _refuse_op(op, hvd)
        _refuse("gradient_predivide_factor", gradient_predivide_factor, 1.0, "dgc divides in fp32")
        _refuse("num_groups", num_groups, 0, "dgc.DGC(bucket_bytes=...) says what goes together")
        _refuse("groups", groups, None, "dgc.DGC(bucket_bytes=...) says what goes together")
        _refuse("sparse_as_dense", sparse_as_dense, False, "use embeddings with sparse=False")
        if not hvd.is_initialized():
            raise ConfigError("Horovod is not initialised: call hvd.init() first")
        if environ.get("HOROVOD_ELASTIC") == "1":
            raise ConfigError("elastic Horovod is not supported: residuals belong to a rank")
        self._passes: Counter[str] = Counter()
        self.set_backward_passes_per_step(backward_passes_per_step)
        comm: Communicator = SelfCommunicator()
        if process_set is None or process_set.included():
            comm = HorovodCommunicator(process_set, timeout_seconds=timeout_seconds)
        else:
            compression = Dense()
        named = _by_position(optimizer) if named_parameters is None else named_parameters
        super().__init__(optimizer, named, compression, comm, scaler=scaler)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes make a step; call it between steps."""
        if passes < 1:
            raise ConfigError(f"backward_passes_per_step is {passes}: it must be at least 1")
        self.backward_passes_per_step = passes
        self._passes.clear()

    def _gradient_ready(self, name: str) -> None:
        if not self._syncing:
            return
        self._passes[name] += 1
        if self._passes[name] > self.backward_passes_per_step:
            raise GradientError(
                f"{name} got gradient number {self._passes[name]} before step(): raise "
                f"backward_passes_per_step, which is {self.backward_passes_per_step}"
            )
        if self._passes[name] == self.backward_passes_per_step:
            super()._gradient_ready(name)

    def synchronize(self) -> None:
        """As `dgc.DistributedOptimizer.synchronize`; passes that are missing are not waited for."""
        try:
            super().synchronize()
        finally:
            self._passes.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `dgc.DistributedOptimizer.load_state_dict`; passes of the step at hand are dropped."""
        super().load_state_dict(state_dict)
        if self._passes:
            self.optimizer.zero_grad()
            self._passes.clear()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`step()` inside applies what `synchronize()`, called before, has brought.

        Raises:
            GradientError: `synchronize()` was not called: ranks would part.
        """
        if not self._synchronized:
            raise GradientError("skip_synchronize() before synchronize(): call that first")
        yield


def _by_position(optimizer: Optimizer) -> list[tuple[str, Parameter]]:
    groups = enumerate(optimizer.param_groups)
    return [(f"param.{i}.{j}", p) for i, group in groups for j, p in enumerate(group["params"])]


def _refuse(name: str, found: object, supported: object, instead: str) -> None:
    if found != supported:
        raise ConfigError(f"{name} is {found!r}: only {supported!r} is supported. {instead}")


def _refuse_optimizer(optimizer: Optimizer) -> None:
    if hasattr(optimizer, "skip_synchronize"):
        raise ConfigError("the optimizer is wrapped for Horovod already: wrap the plain optimizer")


def _refuse_compression(compression: object) -> None:
    if compression is not None and not isinstance(compression, _Compression):
        name = getattr(compression, "__name__", type(compression).__name__)
        raise ConfigError(
            f"compression is Horovod's {name}: give dgc.DGC(), or for a dense exchange dgc.Dense() "
            "or dgc.Dense(dtype=torch.float16), or leave it out"
        )


def _refuse_op(op: Any, hvd: Any) -> None:
    names = {hvd.Sum: "Sum", hvd.Adasum: "Adasum", hvd.Min: "Min", hvd.Max: "Max"}
    if op is not None and op != hvd.Average:
        raise ConfigError(
            f"op is {names.get(op, op)}: only Average is supported. For a sum, multiply the "
            "learning rate by hvd.size()"
        )


def join(*_: Any, **__: Any) -> NoReturn:
    """Refused: a rank that has no more batches has residuals that nobody would receive."""
    raise ConfigError(
        "join() is not supported: give every rank the same number of batches, as "
        "DistributedSampler and DataLoader(drop_last=True) do"
    )


def broadcast_optimizer_state(
    optimizer: Optimizer, root_rank: int = 0, model: torch.nn.Module | None = None
) -> None:
    """Horovod's for a plain optimizer; of a wrapped one, what its own optimizer holds.

    Raises:
        StateError: only some ranks have loaded a state: each rank has residuals of its own.
    """
    hvd = import_horovod()
    if not isinstance(optimizer, _DistributedOptimizer):
        hvd.broadcast_optimizer_state(optimizer, root_rank, model)
        return
    steps = optimizer.comm.all_gather(torch.tensor([optimizer.reducer.step])).wait().view(-1)
    if bool((steps != steps[0]).any()):
        raise StateError(
            f"ranks are at steps {steps.tolist()}: have every rank save its own state_dict(), which "
            "holds its residuals, and load it again"
        )
    inner, group = optimizer.optimizer, getattr(optimizer.comm, "set", None)
    if group is not None:
        state = hvd.broadcast_object(inner.state_dict(), root_rank, process_set=group)
        inner.load_state_dict(state)
