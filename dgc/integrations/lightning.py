"""Lightning: `Trainer(strategy="ddp", callbacks=[DGCCallback(dgc.DGC(...))])`."""

import warnings
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dgc.config import Compression
from dgc.errors import ConfigError, StateError
from dgc.integrations import need, register_prepared
from dgc.train.checkpoint import resize
from dgc.train.hook import HookState

_KEY = "dgc_states"
_Callback: Any = need(("lightning.pytorch", "pytorch_lightning"), "lightning").Callback


class DGCCallback(_Callback):  # type: ignore[misc]
    """Has Lightning's DDP exchange gradients compressed, on CPU and CUDA.

    Lightning's checkpoints then hold the memory of all ranks, and a `fit(ckpt_path=...)` on the same
    number of ranks goes on bit for bit, on another number without loss of mass. The module's
    optimizer is torch.optim.SGD, Adam or AdamW, or any with `DGC(momentum_correction=False)`.

    Args:
        compression: `dgc.DGC(...)` or `dgc.Dense(...)`; `DGC()` by default.

    Attributes:
        state: None until training starts, then what `dgc.register` returns, with `stats()`.

    Raises:
        MissingPackageError: on import, Lightning is not installed.
        ConfigError: when training starts: a strategy without DDP, several optimizers,
            `gradient_clip_val` without Adam; and what `dgc.register` raises.

    Example:
        >>> DGCCallback().state is None
        True
    """

    def __init__(self, compression: Compression | None = None) -> None:
        self.compression = compression
        self.state: HookState | None = None
        self._loaded: list[dict[str, Any]] = []
        self._group: dist.ProcessGroup | None = None  # for checkpoints

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The model is wrapped and the checkpoint read: register the hook."""
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"the module has {len(trainer.optimizers)} optimizers: with dgc it must have one, "
                "with a param group for each kind of parameter"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.state = register_prepared(
            *(trainer.strategy.model, trainer.optimizers[0], self.compression, scaler),
            gradient_clip_val=trainer.gradient_clip_val,
        )
        if dist.get_backend() == "nccl" and self._group is None:  # which would gather on one GPU
            self._group = dist.new_group(backend="gloo")
        states, self._loaded = self._loaded, []
        if states:
            rank, world_size = self.state.comm.rank, self.state.comm.world_size
            same = len(states) == world_size
            mine = states[rank] if same else resize(states, rank, world_size)
            self.state.load_state_dict(mine)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Called on all ranks; rank 0 writes what all of them hold."""
        if self.state is not None:
            states = [None] * self.state.comm.world_size if trainer.is_global_zero else None
            dist.gather_object(self._own_state(), states, group=self._group)
            if states is not None and None not in states:
                checkpoint[_KEY] = states
            elif states is not None:
                warnings.warn(
                    "this checkpoint is without the memory of its ranks: it was saved between a "
                    "backward pass and its step",
                    stacklevel=2,
                )

    def _own_state(self) -> Any:
        """This rank's, on the CPU; None between a backward pass and its step, as in signal handlers."""
        assert self.state is not None
        try:
            return tree_map_only(Tensor, lambda tensor: tensor.cpu(), self.state.state_dict())
        except StateError:
            return None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The model is not wrapped yet: keep it for `on_train_start`."""
        if trainer.state.fn == "fit":  # and not to test or validate a checkpoint
            self._loaded = checkpoint.get(_KEY, [])
            if not self._loaded:
                warnings.warn(
                    "training resumes without the memory of its ranks: the checkpoint has none",
                    stacklevel=2,
                )
