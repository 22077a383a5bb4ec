"""The patterns of exchange: agreement, conservation, balance and volume at any number of ranks."""

import pytest
import torch
from torch import Tensor

import dgc
from dgc.comm.exchange import Regions
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, sgd_of, train, wrap

RANKS = [1, 2, 3, 4, 8, 16, 32]
CONFIG = {"pattern": "re-selecting", "density": 0.1, "min_selected": 1}


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("numel", [1, 5, 31, 1000])
def test_regions_part_the_indices(world_size: int, numel: int) -> None:
    regions = Regions(numel, world_size)
    owner, place = regions.locate(torch.arange(numel))
    assert int(place.max()) < regions.region_numel
    assert len(set(zip(owner.tolist(), place.tolist(), strict=True))) == numel
    for rank in range(world_size):
        mine = owner == rank
        assert torch.equal(regions.indices(rank, place[mine]), torch.arange(numel)[mine])
        assert bool((place[mine].diff() > 0).all())


def test_indices_are_exact_past_32_bits() -> None:
    regions = Regions(2**40, 7)
    indices = torch.cat([torch.arange(2**24 - 9, 2**24 + 9), torch.arange(2**40 - 99, 2**40)])
    owner, place = regions.locate(indices)
    back = torch.stack([regions.indices(o, p) for o, p in zip(owner.tolist(), place, strict=True)])
    assert torch.equal(back, indices)


@pytest.mark.parametrize("stride", [1, 8, 64, 512, 513])
def test_regions_balance_runs_and_strides(stride: int) -> None:
    owner, _ = Regions(10**7, 8).locate(torch.arange(0, 10_000 * stride, stride))
    counts = torch.bincount(owner, minlength=8)
    assert int(counts.max()) < 1.15 * 10_000 / 8


@pytest.mark.parametrize("bits", [1, 4, 32])
@pytest.mark.parametrize("world_size", RANKS)
def test_ranks_stay_bit_identical(world_size: int, bits: int) -> None:
    config = dgc.DGC(**CONFIG, value_bits=bits)

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy(seed=comm.rank)
        train(model, wrap(model, config, comm), range(12))
        return flat(model)

    first, *others = run_ranks(world_size, body)
    assert bool(first.isfinite().all())
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("bits", [1, 4, 32])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
def test_conservation_across_ranks(world_size: int, bits: int) -> None:
    """Σ sent + Σ residuals = Σ what entered, whatever owners drop and round."""
    config = dgc.DGC(**CONFIG, value_bits=bits, momentum_correction=False, fold_lr=False)

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm, {"momentum": 0.0})
        entered, sent = torch.zeros(2, flat(model).numel(), dtype=torch.float64)
        for step in range(20):
            found = gradients(step, comm.rank)
            found[1] *= 1e4  # tensors of different scale share messages
            entered += torch.cat([g.view(-1) for g in found])
            optimizer.zero_grad()
            model.loss(found).backward()
            optimizer.synchronize()
            sent += torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
            optimizer.step()
        memory = optimizer.state_dict()["memory"]
        kept = torch.cat([memory[name]["v"] for name, _ in model.named_parameters()])
        return entered, sent, kept

    results = run_ranks(world_size, body)
    entered = torch.stack([each[0] for each in results]).sum(0)
    kept = torch.stack([each[2].double() for each in results]).sum(0)
    error = (world_size * results[0][1] + kept - entered).abs()
    scale = torch.stack([each[0].abs() for each in results]).sum(0).clamp(min=1)
    assert float((error / scale).max()) <= 1e-5


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_density_one_is_dense_sgd(world_size: int) -> None:
    config = dgc.DGC(pattern="re-selecting", density=1.0, momentum_masking=False, value_bits=32)

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        train(model, wrap(model, config, comm, {"lr": 0.1, "momentum": 0.9}), range(20))
        return flat(model)

    found = run_ranks(world_size, body)[0]
    model = Toy()
    sgd = sgd_of(model, {"lr": 0.1, "momentum": 0.9})
    for step in range(20):
        everybody = zip(*(gradients(step, rank) for rank in range(world_size)), strict=True)
        sgd.zero_grad()
        model.loss([torch.stack(each).mean(0) for each in everybody]).backward()
        sgd.step()
    assert float((found - flat(model)).norm()) <= 1e-6 * float(flat(model).norm())


def test_a_rank_that_is_not_finite_makes_all_skip() -> None:
    config = dgc.DGC(**CONFIG, bucket_bytes=32)  # in the others' buckets something was sent

    def body(comm: ThreadCommunicator) -> tuple[Tensor, int, bool]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        train(model, optimizer, range(3))
        before = flat(model)

        def find(step: int, rank: int) -> list[Tensor]:
            found = gradients(step, rank)
            found[0][2, 3] = torch.inf if rank == 1 else 0.0
            return found

        train(model, optimizer, range(3, 4), find)
        same = torch.equal(before, flat(model))
        train(model, optimizer, range(4, 8))
        return flat(model), int(optimizer.stats()["skipped_steps"]), same

    results = run_ranks(3, body)
    assert [each[1:] for each in results] == [(1, True)] * 3
    assert all(torch.equal(results[0][0], each[0]) for each in results)
    assert bool(results[0][0].isfinite().all())


def test_empty_selections_pass() -> None:
    """Zero gradients select nothing worth sending, and a rank may have no gradient at all."""
    config = dgc.DGC(**CONFIG)

    def find(step: int, rank: int) -> list[Tensor | None]:
        found = [torch.zeros_like(g) for g in gradients(step, rank)]
        return [None, *found[1:]] if rank else [*found]

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(model, config, comm, {"momentum": 0.9})
        train(model, optimizer, range(4), find)
        return flat(model)

    for found in run_ranks(4, body):
        assert torch.equal(found, flat(Toy()))


def test_received_volume_is_flat_in_ranks() -> None:
    """At 32 ranks about as much as at 8, and far less than an all-gather."""
    numel = 200_000

    def received(world_size: int, pattern: str) -> float:
        config = dgc.DGC(pattern=pattern, density=0.01)

        def body(comm: ThreadCommunicator) -> float:
            weight = torch.nn.Parameter(torch.zeros(numel))
            sgd = torch.optim.SGD([weight], lr=0.1)
            optimizer = dgc.DistributedOptimizer(sgd, [("w", weight)], config, comm)
            generator = torch.Generator().manual_seed(comm.rank)
            weight.grad = torch.randn(numel, generator=generator)
            optimizer.step()
            return float(optimizer.stats()["received_bytes"])

        return max(run_ranks(world_size, body))

    eight, many = received(8, "re-selecting"), received(32, "re-selecting")
    assert many < 1.3 * eight
    assert many < 0.25 * received(32, "all-gather")


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(dgc.DGCError, match="pattern is 'ring'"):
        dgc.DGC(pattern="ring")
