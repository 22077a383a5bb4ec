"""Hugging Face Trainer: `register` between making the Trainer and `train()`."""

import warnings
from pathlib import Path
from typing import Any

from dgc.config import Compression
from dgc.integrations import need, register_prepared
from dgc.train import checkpoint
from dgc.train.hook import HookState


def register(trainer: Any, compression: Compression | None = None) -> Any:
    """Have a Trainer exchange its gradients compressed.

    Call it once, before `trainer.train()`. The Trainer's own AdamW will do; SGD wants
    `max_grad_norm=0`, and `DGC(clip_norm=...)` in its place. Each checkpoint gets a
    folder "dgc" with the memory of all ranks, and `train(resume_from_checkpoint=...)` reads that of
    `output_dir`.

    Args:
        trainer: a `transformers.Trainer`.
        compression: `dgc.DGC(...)` or `dgc.Dense(...)`; `DGC()` by default.

    Returns:
        The callback that was added: its `state`, None until training begins, is what
        `dgc.register` returns, with `stats()`.

    Raises:
        MissingPackageError: transformers is not installed.
        ConfigError: when training begins: one process only, `max_grad_norm` without Adam; and what
            `dgc.register` raises.
    """
    callback = _callback_class()(trainer, compression)
    trainer.add_callback(callback)
    return callback


def _callback_class() -> Any:
    base: Any = need(("transformers",), "'transformers[torch]'").TrainerCallback

    class DGCCallback(base):  # type: ignore[misc]
        """Registers the hook when the Trainer has wrapped its model; saves and loads the memory."""

        def __init__(self, trainer: Any, compression: Compression | None) -> None:
            self.trainer, self.compression = trainer, compression
            self.state: HookState | None = None
            self._model: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer = self.trainer
            if self.state is None or self._model is not trainer.model_wrapped:
                self._model = trainer.model_wrapped
                scaler = trainer.accelerator.scaler
                self.state = register_prepared(
                    *(self._model, trainer.optimizer, self.compression, scaler),
                    max_grad_norm=args.max_grad_norm,
                )
            if state.global_step:
                self._resume(_folder(args, state))

        def _resume(self, folder: Path) -> None:
            assert self.state is not None
            if folder.exists():
                checkpoint.load(self.state, folder)
            else:
                warnings.warn(
                    f"training resumes without the memory of its ranks: there is no {folder}",
                    stacklevel=2,
                )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert self.state is not None, "the Trainer saves after on_train_begin"
            checkpoint.save(self.state, _folder(args, state))

    return DGCCallback


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", "dgc")
