"""`apply_fsdp2`: sharded inside a group of ranks, compressed between the copies of a shard.

FSDP2 reduces gradients inside the shard group and leaves each rank the gradient of its own shards.
What travels between the groups, usually between hosts, is exchanged here when backward has ended.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from dgc.comm.torch_dist import TorchCommunicator
from dgc.config import DGC, Compression
from dgc.errors import ConfigError, GradientError, StateError
from dgc.train.agree import check_agreement, named_parameters_of
from dgc.train.attached import Attached
from dgc.train.inner import InnerStep, check_supported
from dgc.train.momentum import local


class Fsdp2State(Attached):
    """What `apply_fsdp2` returns: the memory of this rank's shards, by parameter name.

    The local momentum that weight decay needs is kept as the inner step keeps it, as DTensors; in
    `state_dict` it is plain, this rank's part.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, Parameter],
        group: dist.ProcessGroup,
        optimizer: Optimizer,
        config: Compression,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        device = local(next(iter(params.values()))).device
        self.comm = TorchCommunicator(group, device=device)
        self.params = params
        # The reducer sees this rank's shards alone.
        shards = {name: Parameter(local(p).detach()) for name, p in params.items()}
        every = {name: local(p) for name, p in model.named_parameters()}  # frozen ones too
        check_agreement(every, config.describe(), self.comm)
        for shard in every.values():
            self.comm.broadcast_(shard.detach())
        self.inner = InnerStep(optimizer, params, config, self.comm.world_size, scaler)
        self.reducer = self.inner.reducer(shards, self.comm)
        self._shards = TorchCommunicator(_mesh(params).get_group(), device=device)
        self.reducer.agree = self._all_finite
        self._queued = self._arrived = False
        self._stale = self._delivered = False  # .grad may still hold the mean of the step before
        for param in params.values():
            param.register_post_accumulate_grad_hook(self._reduced)
        model.register_forward_hook(self._after_forward)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._queued = self._arrived = False  # a backward pass that was interrupted leaves them set
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._before_backward)

    def _before_backward(self, _: Tensor) -> None:
        if not self._queued:  # within the pass FSDP2 leaves gradients in place
            self._stale = self._delivered and any(
                p.grad is not None and bool(local(p.grad).any()) for p in self.params.values()
            )
        self._queue()

    def _queue(self) -> None:
        """Exchange at the end of the backward pass.

        Of its outermost part, as it is called first there: checkpointed activations with reentry run
        backward passes inside it, at the end of each of which FSDP2 has left some gradients in place.
        """
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._exchange)

    def _reduced(self, _: Tensor) -> None:
        """FSDP2 has left a gradient in place."""
        self._arrived = True
        self._queue()

    @torch.no_grad()
    def _exchange(self) -> None:
        arrived, self._queued, self._arrived = self._arrived, False, False
        if not arrived:
            return
        if self._stale:
            raise GradientError(
                "a backward pass added to gradients that already hold the mean of the step before: "
                "call optimizer.zero_grad() after each step, and run all but the last backward pass of "
                "a step with model.set_requires_gradient_sync(False)"
            )
        self._refuse_dropped()
        shards = self.reducer.params
        for name, param in self.params.items():
            shards[name].grad = None if param.grad is None else local(param.grad)
        try:
            self._apply = self.reducer.finish()
        finally:
            self.inner.exchanged()
        for name, param in self.params.items():
            grad, shards[name].grad = shards[name].grad, None
            param.grad = None if grad is None else _like(grad, param)
        self._fresh = self._delivered = True

    def _all_finite(self, finite: bool) -> bool:
        """A step is skipped for all shards or for none."""
        bad = torch.tensor([not finite], dtype=torch.int64, device=self._shards.device)
        return not self._shards.all_reduce(bad).wait().any()

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory of its own shards: plain tensors, numbers, strings."""
        state = super().state_dict()
        momentum = {name: local(b) for name, b in state["local_momentum"].items()}
        return {**state, "local_momentum": momentum, "shard": self._shards.rank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave on the same rank and the same mesh.

        Raises:
            StateError: another format version, rank, world size, shard, or model.
        """
        if state_dict.get("shard") != self._shards.rank:
            raise StateError(
                f"this state is of shard {state_dict.get('shard')}, this rank holds shard "
                f"{self._shards.rank}: give each rank what it saved, on the same mesh"
            )
        super().load_state_dict({**state_dict, "local_momentum": {}})
        self.inner.local.buffers = {
            name: _like(buffer.clone(), self.params[name])
            for name, buffer in state_dict["local_momentum"].items()
        }


def apply_fsdp2(
    model: nn.Module,
    replicate_group: dist.ProcessGroup,
    optimizer: Optimizer,
    compression: Compression | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Fsdp2State:
    """Exchange gradients compressed between the copies of an FSDP2 model.

    With a mesh of [replicate, shard] call `fully_shard(module, mesh=mesh["shard"])` on the model and
    its layers, make the optimizer, then call this once with `mesh["replicate"].get_group()`. The
    shards are overwritten with those of the group's first rank. The training loop stays as it is;
    after `backward()` the gradients are the mean over all ranks.

    Args:
        model: the root module, after `torch.distributed.fsdp.fully_shard`.
        replicate_group: the ranks that hold the same shards.
        optimizer: torch.optim.SGD, Adam or AdamW over the model's parameters; any optimizer
            with `DGC(momentum_correction=False)` or `Dense`.
        compression: `dgc.DGC(...)` or `dgc.Dense(...)`; `DGC()` by default.
        scaler: the `torch.amp.GradScaler` of the training loop, if it has one.

    Returns:
        The state of this rank's shards, with `state_dict()`, `load_state_dict()` and `stats()`.

    Raises:
        ConfigError: native HSDP, a model that is not sharded or on a mesh of several dimensions, a
            group whose ranks hold different shards, `clip_norm`; and what `dgc.register` raises.

    Example:
        >>> apply_fsdp2(nn.Linear(1, 1), None, None)
        Traceback (most recent call last):
        ...
        dgc.errors.ConfigError: the model is a Linear: call fully_shard(model, mesh=mesh["shard"]) first
    """
    config = DGC() if compression is None else compression
    if not isinstance(model, FSDPModule):
        raise ConfigError(
            f'the model is a {type(model).__name__}: call fully_shard(model, mesh=mesh["shard"]) '
            "first"
        )
    if isinstance(config, DGC) and config.clip_norm is not None:
        raise ConfigError(
            "clip_norm needs the norm of a rank's whole gradient, and with FSDP2 a rank has shards: "
            "leave it None"
        )
    check_supported(optimizer, config, scaler)
    params = named_parameters_of(optimizer, model.named_parameters())
    _check_sharding(dict(model.named_parameters()), set(params.values()))
    _check_groups(params, replicate_group)
    state = Fsdp2State(model, params, replicate_group, optimizer, config, scaler)
    state.attach()
    return state


def _check_sharding(named: Mapping[str, Parameter], trained: set[Parameter]) -> None:
    for name, param in named.items():
        if param.requires_grad and param not in trained:
            raise ConfigError(f"the optimizer does not train {name}: give it all of the model")
        if not isinstance(param, DTensor):
            raise ConfigError(f"{name} is not sharded: call fully_shard on the root module too")
        if any(isinstance(each, Replicate) for each in param.placements):
            raise ConfigError(
                f"{name} is replicated by native HSDP, whose dense all-reduce cannot be replaced: "
                'call fully_shard with the one-dimensional mesh["shard"] and give '
                'mesh["replicate"].get_group() to apply_fsdp2'
            )
        if param.device_mesh.ndim != 1:
            raise ConfigError(
                f"{name} is sharded over {param.device_mesh.ndim} mesh dimensions: only FSDP2 over "
                "one dimension is supported, without tensor parallelism"
            )


def _check_groups(params: Mapping[str, Parameter], replicate_group: dist.ProcessGroup) -> None:
    shards = dist.get_process_group_ranks(_mesh(params).get_group())
    copies = dist.get_process_group_ranks(replicate_group)
    if set(shards) & set(copies) != {dist.get_rank()}:
        raise ConfigError(
            f"the model is sharded over ranks {shards}, and replicate_group is {copies}: it must "
            "hold the same shard's other copies, which share no rank but this one with them"
        )


def _mesh(params: Mapping[str, Any]) -> Any:
    return next(iter(params.values())).device_mesh


def _like(part: Tensor, param: Any) -> Any:
    """This rank's part, as a DTensor laid out as `param`."""
    return DTensor.from_local(
        part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
