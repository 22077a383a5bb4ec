"""From the gradients of a backward pass to the mean over ranks, bucket by bucket."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import record_function

from dgc.comm.base import Communicator, Handle
from dgc.config import DGC, Compression, Dense
from dgc.core import kernels
from dgc.core.layout import Layout
from dgc.errors import GradientError, StateError
from dgc.train.bucket import Bucket, DenseBucket, Row
from dgc.train.clip import local_clip_scale
from dgc.train.patterns import Patterns
from dgc.train.plan import is_excluded, plan
from dgc.train.state import BEFORE_STEP
from dgc.train.stats import Stats
from dgc.train.step import Arrival

Enter = Callable[[Sequence[str], Sequence[Tensor], Sequence[Row]], tuple[list[Tensor], list[Row]]]


class Reducer:
    """Exchanges the gradients of `params`; state is keyed by parameter name.

    `ready(name)` is called as each gradient is complete; a bucket is compressed and its exchange
    started when all of its gradients are, always in the same order, so that ranks agree.
    `finish()` starts what is left, waits, and writes the means into `.grad`.

    Args:
        params: parameters by name, in the order of registration.
        config: `DGC` or `Dense`.
        comm: the ranks.
        rows: how the gradient of a parameter enters the memory now.
        loss_scale: by what the gradients of this step are too large.
        enter: what enters the memory for the gradients of a bucket that are used, and how.

    Attributes:
        agree: from whether this step is finite here to whether it is wherever the model is stepped.
        idle: the names that no rank used in the last step.
    """

    def __init__(
        self,
        params: Mapping[str, Parameter],
        config: Compression,
        comm: Communicator,
        rows: Callable[[str], Row],
        loss_scale: Callable[[], float] = lambda: 1.0,
        enter: Enter = lambda names, grads, rows: (list(grads), list(rows)),
    ) -> None:
        self.params, self.config, self.comm = dict(params), config, comm
        self.rows, self.loss_scale, self._enter = rows, loss_scale, enter
        self.agree: Callable[[bool], bool] = lambda finite: finite
        self.idle: set[str] = set()
        self.names = plan(self.params, config)
        self._patterns = self._make_patterns()
        self.buckets = [self._bucket(names) for names in self.names]
        self.stats = Stats(pattern=self.buckets[0].pattern.name)
        self.step = 0
        self._clip_norm = config.clip_norm if isinstance(config, DGC) else None
        self._place = {name: i for i, names in enumerate(self.names) for name in names}
        self._known = {name: (param.numel(), param.device) for name, param in self.params.items()}
        self._skipped_in_a_row = 0
        self._one_at_a_time = threading.RLock()  # backward has a thread for each device
        self._begin()

    def _begin(self) -> None:
        self._ready: set[str] = set()
        self._given: dict[str, Tensor] = {}
        self._unused: set[str] = set()
        self._missing = [len(names) for names in self.names]
        self._started: list[tuple[Handle, list[Row], int, float]] = []
        self._sent: dict[str, tuple[Tensor, int]] = {}  # `.grad` and its version when it was sent
        self._clip_scale: float | None = None

    def _make_patterns(self) -> Patterns | None:
        if not isinstance(self.config, DGC):
            return None
        compressed = [names for names in self.names if not is_excluded(names[0], self.config)]
        device = self.params[(compressed or self.names)[0][0]].device
        sizes = [self._numels(names) for names in compressed]
        return Patterns(self.config, self.comm, sizes, device)

    def _numels(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.params[name].numel() for name in names)

    def _bucket(self, names: tuple[str, ...]) -> Bucket:
        layout = Layout.of(self._numels(names), self.params[names[0]].device)
        if self._patterns is not None and not is_excluded(names[0], self.config):
            return self._patterns.bucket(layout)
        dtype = self.config.dtype if isinstance(self.config, Dense) else torch.float32
        return DenseBucket(layout, dtype, self.comm.world_size)

    @property
    def pending(self) -> bool:
        """Whether gradients of this step are under way."""
        return bool(self._ready)

    @property
    def masked(self) -> dict[str, float]:
        """The share of all ranks' momentum that the last exchange cleared where it sent an element."""
        masked = [share for bucket in self.buckets for share in bucket.masked(self.step - 1)]
        return dict(zip(self._place, masked, strict=True))

    @property
    def missing(self) -> list[str]:
        """The parameters whose gradient is not complete yet."""
        return [name for name in self.params if name not in self._ready]

    def ready(self, name: str, grad: Tensor | None = None, *, used: bool = True) -> None:
        """The gradient of `name` is complete.

        Args:
            name: the parameter.
            grad: where the gradient lies and the mean shall be written; `.grad` by default.
            used: False if `grad` is zero only because the parameter was not used.

        Raises:
            GradientError: it was complete already: a second backward pass before the step.
        """
        with self._one_at_a_time:
            self._note(name, grad, used)
            if self._clip_norm is not None and len(self._ready) < len(self.params):
                return  # the norm needs the whole gradient
            while len(self._started) < len(self.buckets) and not self._missing[len(self._started)]:
                self._start()

    def _note(self, name: str, grad: Tensor | None, used: bool) -> None:
        if name in self._ready:
            raise GradientError(
                f"{name} got a second gradient before step(): run all but the last backward pass "
                "of a step inside `with optimizer.no_sync():`"
            )
        self._ready.add(name)
        if grad is not None:
            self._given[name] = grad
            self._unused |= set() if used else {name}
        self._missing[self._place[name]] -= 1

    @torch.no_grad()
    def finish(self) -> bool:
        """Exchange what is left and write the means into `.grad`.

        Returns:
            False if all ranks must skip this step, as one of them has a non-finite gradient.

        Raises:
            CommError: another rank died. WireError: a message was damaged.
            GradientError: too many skipped steps in a row.
        """
        while len(self._started) < len(self.buckets):
            self._start()
        changed = self._changed()
        arrivals = [self._receive(i) for i in range(len(self.buckets))]
        if changed:
            self._drop()
            raise GradientError(
                f"the gradient of {changed[0]} was changed or cleared between backward() and step(), while "
                "it was exchanged: to clip the mean call optimizer.synchronize() first, or give clip_norm. "
                "This step is dropped"
            )
        finite = self.agree(all(arrival.finite for arrival in arrivals))
        self.idle.clear()
        for names, bucket, arrival in zip(self.names, self.buckets, arrivals, strict=True):
            if finite:
                bucket.applied_()
            else:
                bucket.put_back_()
                for name in names:  # as a dense exchange would leave it, and a scaler looks for it
                    self._grad(name).fill_(torch.nan)
            for index, used in enumerate(arrival.used):
                if not used and arrival.finite:
                    self.idle.add(names[index])
                    bucket.forget_(index)
                    if names[index] in self._given:
                        self._given[names[index]].zero_()  # it may be `.grad` itself
                    else:
                        self.params[names[index]].grad = None
        self._begin()
        self.step += 1
        self.stats.steps += 1
        self._count_skips(finite)
        return finite

    def _own(self, name: str) -> Tensor | None:
        """`.grad`, if a change of it shows: views of one storage have their version in common."""
        grad = None if name in self._given else self.params[name].grad
        if grad is None or grad.is_inference() or grad.untyped_storage().nbytes() != grad.nbytes:
            return None
        return grad

    def _changed(self) -> list[str]:
        """The names whose gradient was written to, replaced or taken away since it was sent."""
        return [
            name
            for name, (grad, version) in self._sent.items()
            if self.params[name].grad is not grad or grad._version != version
        ]

    def _drop(self) -> None:
        """Give what was sent back to the memory, and forget the gradients."""
        for bucket in self.buckets:
            bucket.put_back_()
        for param in self.params.values():
            param.grad = None
        self._begin()

    def _count_skips(self, finite: bool) -> None:
        self.stats.skipped_steps += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        limit = self.config.max_skipped_steps
        if limit is not None and self._skipped_in_a_row > limit:
            raise GradientError(
                f"{self._skipped_in_a_row} steps in a row had a non-finite gradient on some rank: "
                "lower the learning rate, clip, or raise max_skipped_steps"
            )

    @torch.no_grad()
    def _start(self) -> None:
        index = len(self._started)
        bucket, names = self.buckets[index], self.names[index]
        with self._timed("compress_seconds"):
            used = [self._uses(name) for name in names]
            scale = self._scale()
            grads = [self._grad(name) for name in names] if math.isfinite(scale) else None
            rows = [self.rows(name) for name in names]
            if scale != 1.0:
                rows = [row._replace(gain=row.gain * scale) for row in rows]
            if grads is not None:
                self._let_enter(names, used, grads, rows)
            payload = bucket.send(grads, rows, used, self.step)
        density = bucket.density(self.step)
        if index == 0:
            self.stats.density, self.stats.pattern = density, bucket.pattern.name
        self.stats.density = min(density, self.stats.density)
        started = time.perf_counter()
        handle = bucket.pattern.start(self.comm, payload)
        self._started.append((handle, rows, payload.nbytes, started))
        self._sent |= {
            name: (grad, grad._version) for name in names if (grad := self._own(name)) is not None
        }

    def _let_enter(
        self, names: Sequence[str], used: Sequence[bool], grads: list[Tensor], rows: list[Row]
    ) -> None:
        """Overwrite `grads` and `rows` with what enters the memory, where they are used."""
        which = [i for i, each in enumerate(used) if each]
        found = self._enter(
            [names[i] for i in which], [grads[i] for i in which], [rows[i] for i in which]
        )
        for i, grad, row in zip(which, *found, strict=True):
            grads[i], rows[i] = grad, row

    def _scale(self) -> float:
        """The clipping factor of this step; nan if clipping finds the gradient not finite."""
        if self._clip_norm is None:
            return 1.0
        if self._clip_scale is None:
            grads = [self._grad(name) for name in self.params if self._uses(name)]
            squared = kernels.squared_norm(grads) / self.loss_scale() ** 2 if grads else 0.0
            finite = math.isfinite(squared)
            scale = local_clip_scale(squared, self._clip_norm, self.comm.world_size)
            self._clip_scale = scale if finite else math.nan
        return self._clip_scale

    def _uses(self, name: str) -> bool:
        if name in self._given:
            return name not in self._unused
        return self.params[name].grad is not None

    def _grad(self, name: str) -> Tensor:
        """The gradient; a parameter without one contributes zero, as in a dense exchange."""
        if name in self._given:
            return self._given[name]
        param = self.params[name]
        now = param.numel(), param.device
        if now != self._known[name]:  # compiled loops go by these
            raise GradientError(
                f"{name} has {now[0]} elements on {now[1]}, when it was wrapped it had "
                "{} on {}: wrap again after a parameter has changed".format(*self._known[name])
            )
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        if param.grad.layout != torch.strided:
            raise GradientError(
                f"the gradient of {name} is {param.grad.layout}: use dense gradients "
                "(for an embedding, sparse=False)"
            )
        return param.grad

    def _receive(self, index: int) -> Arrival:
        bucket, names = self.buckets[index], self.names[index]
        handle, rows, payload_bytes, started = self._started[index]
        with self._timed("exchange_seconds"), record_function("dgc::exchange"):
            gathered = handle.wait()
        self._count(bucket, payload_bytes, time.perf_counter() - started)
        with self._timed("compress_seconds"):
            grads = [self._grad(name) for name in names]
            dense = [g.to(torch.float32).contiguous() for g in grads]
            with record_function("dgc::decode"):
                arrival = bucket.receive_(gathered, dense, rows)
            for grad, mean in zip(grads, dense, strict=True):
                if grad is not mean:
                    grad.copy_(mean)
                    if grad.dtype is torch.float16 and not grad.isfinite().all():
                        arrival = arrival._replace(finite=False)  # it holds no more than 65,504
        return arrival

    @contextmanager
    def _timed(self, field: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            setattr(self.stats, field, getattr(self.stats, field) + spent)

    def _count(self, bucket: Bucket, payload_bytes: int, under_way_seconds: float) -> None:
        if self.comm.world_size == 1:
            return
        self.stats.dense_bytes += 4 * bucket.layout.offsets[-1]
        moved = bucket.pattern.traffic(self.comm.world_size, payload_bytes)
        self.stats.sent_bytes += moved.sent
        self.stats.received_bytes += moved.received
        self.stats.local_bytes += moved.local
        self.stats.compress_seconds += moved.code_seconds
        self.stats.exchange_seconds -= moved.code_seconds
        self.stats.under_way_seconds += under_way_seconds - moved.code_seconds

    def state_dict(self) -> dict[str, Any]:
        """The step, and the memory of every parameter by name.

        Raises:
            StateError: gradients are under way, which are in no memory.
        """
        if self.pending:
            raise StateError(BEFORE_STEP)
        memory = {
            name: {key: state.clone() for key, state in tensors.items()}
            for name, tensors in self.memory.items()
        }
        return {"step": self.step, "memory": memory}

    @property
    def memory(self) -> dict[str, dict[str, Tensor]]:
        """Views of the state of every parameter, by name."""
        return {
            name: bucket.tensors(index)
            for names, bucket in zip(self.names, self.buckets, strict=True)
            for index, name in enumerate(names)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; `check_state` first."""
        for name, tensors in self.memory.items():
            for key, tensor in tensors.items():
                tensor.copy_(state["memory"][name][key])
        for bucket in self.buckets:
            bucket.restored()
        self.step = state["step"]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `StateError` if `state` has other parameters, shapes or kinds of memory."""
        if self.pending:
            raise StateError(
                "a state is loaded between steps, and gradients of one are under way: end its backward "
                "pass and step(), or with DistributedOptimizer synchronize(), first"
            )
        own = self.memory
        for name in sorted(own.keys() | state["memory"].keys()):
            found = _kinds(state["memory"].get(name, {}))
            wanted = _kinds(own.get(name, {}))
            if found != wanted:
                raise StateError(
                    f"the memory of {name} in this state is {found}, here it is {wanted}: load it "
                    "with the model and the compression that wrote it"
                )


def _kinds(memory: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each tensor its elements and dtype. Example: {"v": "7 torch.float32"}."""
    return {key: f"{tensor.numel()} {tensor.dtype}" for key, tensor in memory.items()}
