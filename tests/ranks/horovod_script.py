"""On each rank: what Horovod scripts do, by `dgc.horovod`, bit for bit against what must come out.

Every figure is a small integer or a power of two, so no rounding can occur.
"""

import horovod.torch
import pytest
import torch

import dgc
import dgc.horovod as hvd
from dgc.errors import ConfigError, GradientError, StateError
from tests.threads import run_ranks
from tests.workers import Toy, flat, gradients, sgd_of, wrap

OPTIONS = {"lr": 0.5, "momentum": 0.5}
SPARSE = dgc.DGC(density=0.1, min_selected=1, value_bits=32)
FULL = dgc.DGC(density=1.0, momentum_masking=False, value_bits=32)


def integers(step: int, rank: int) -> list[torch.Tensor]:
    return gradients(step, rank, integers=True)


def steps(model: Toy, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        optimizer.zero_grad()
        model.loss(integers(step, hvd.rank())).backward()
        optimizer.step()


def same_everywhere(model: Toy) -> bool:
    everybody = hvd.allgather(flat(model).unsqueeze(0), name="everybody")
    return all(torch.equal(each, everybody[0]) for each in everybody)


def passes_and_clipping() -> None:
    """Two backward passes a step, clipping between synchronize and step."""
    model = Toy(seed=hvd.rank(), integers=True)
    sgd = sgd_of(model, OPTIONS)
    optimizer = hvd.DistributedOptimizer(
        sgd, model.named_parameters(), compression=SPARSE, backward_passes_per_step=2
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    for step in range(4):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for half in (2 * step, 2 * step + 1):
            model.loss(integers(half, hvd.rank())).backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_value_(model.parameters(), 4.0)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert same_everywhere(model)

    def twin(comm) -> torch.Tensor:  # type: ignore[no-untyped-def]
        model = Toy(integers=True)
        optimizer = wrap(model, SPARSE, comm, OPTIONS)
        for step in range(4):
            optimizer.zero_grad()
            with optimizer.no_sync():
                model.loss(integers(2 * step, comm.rank)).backward()
            model.loss(integers(2 * step + 1, comm.rank)).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_value_(model.parameters(), 4.0)
            optimizer.step()
        return flat(model)

    assert torch.equal(flat(model), run_ranks(hvd.size(), twin)[0])
    optimizer.zero_grad()
    model.loss(integers(0, 0)).backward()
    optimizer.step()  # fewer passes than promised, as at the end of the data
    optimizer.set_backward_passes_per_step(1)
    for _ in range(2):  # passes inside no_sync() are not counted
        optimizer.zero_grad()
        with optimizer.no_sync():
            model.loss(integers(0, 0)).backward()
        model.loss(integers(0, 0)).backward()
        optimizer.step()
    assert same_everywhere(model)


def as_horovods_own() -> None:
    """At density 1, what Horovod's dense optimizer gives; parameters named by position."""
    finals = []
    for wrapper, options in (
        (horovod.torch.DistributedOptimizer, {}),
        (hvd.DistributedOptimizer, {"compression": FULL, "op": hvd.Average}),
    ):
        model = Toy(integers=True)
        optimizer = wrapper(sgd_of(model, OPTIONS), **options)
        steps(model, optimizer, 5)
        finals.append(flat(model))
    assert torch.equal(*finals)


def process_sets() -> None:
    """Even ranks train together, odd ones each alone."""
    even = hvd.add_process_set(range(0, hvd.size(), 2))
    model = Toy(integers=True)
    optimizer = hvd.DistributedOptimizer(
        sgd_of(model, OPTIONS), model.named_parameters(), compression=FULL, process_set=even
    )
    steps(model, optimizer, 3)
    twin = Toy(integers=True)
    members = even.ranks if even.included() else [hvd.rank()]
    sgd = sgd_of(twin, OPTIONS)
    for step in range(3):
        drawn = zip(*(integers(step, rank) for rank in members), strict=True)
        for param, grads in zip(twin.parameters(), drawn, strict=True):
            param.grad = torch.stack(grads).mean(0)
        sgd.step()
    assert torch.equal(flat(model), flat(twin))


def refused(error: type[Exception], words: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        call()


def mistakes() -> None:
    model = Toy()
    sgd = sgd_of(model, OPTIONS)
    own = horovod.torch.DistributedOptimizer(sgd_of(Toy(), OPTIONS))
    refused(ConfigError, "wrapped for Horovod", lambda: hvd.DistributedOptimizer(own))
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters())
    refused(GradientError, "before synchronize", lambda: optimizer.skip_synchronize().__enter__())
    backward = lambda: model.loss(gradients(0, 0)).backward()  # noqa: E731
    backward()
    refused(GradientError, "raise backward_passes_per_step, which is 1", backward)
    other = hvd.DistributedOptimizer(sgd_of(Toy(), OPTIONS))
    other.reducer.step = hvd.rank()
    refused(StateError, r"ranks are at steps \[0, 1", lambda: hvd.broadcast_optimizer_state(other))


toy = Toy()
refused(ConfigError, "call hvd.init", lambda: hvd.DistributedOptimizer(sgd_of(toy, OPTIONS)))
hvd.init(process_sets="dynamic")
passes_and_clipping()
as_horovods_own()
process_sets()
mistakes()
if hvd.rank() == 0:
    print("Horovod scripts agree")
