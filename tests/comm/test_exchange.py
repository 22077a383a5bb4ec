"""The patterns of exchange: agreement, conservation, balance and volume at any number of ranks."""

import pytest
import torch
from torch import Tensor

import dgc
from dgc.comm.exchange import Regions
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, sgd_of, train, wrap

RANKS = [1, 2, 3, 4, 8, 16, 32]
SMALL = {"density": 0.1, "min_selected": 1}
# Each pattern, and how many ranks share a host.
PATTERNS = [
    ("all-gather", 1),
    ("dense", 1),
    ("shared-indices", 1),
    ("re-selecting", 1),
    ("hierarchical", 1),
    ("hierarchical", 2),
    ("hierarchical", 4),
]


def per_host_that_fits(per_host: int, world_size: int) -> int:
    """`per_host`, or all ranks where they cannot be shared out so."""
    return per_host if world_size % per_host == 0 else world_size


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


@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
@pytest.mark.parametrize(
    ("world_size", "bits"), [(1, 4), (2, 1), (3, 32), (4, 4), (8, 1), (16, 4), (32, 4)]
)
def test_ranks_stay_bit_identical(world_size: int, bits: int, pattern: str, per_host: int) -> None:
    config = dgc.DGC(**SMALL, pattern=pattern, value_bits=bits)

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy(seed=comm.rank)
        train(model, wrap(model, config, comm), range(12))
        return flat(model)

    first, *others = run_ranks(world_size, body, per_host_that_fits(per_host, world_size))
    assert bool(first.isfinite().all())
    assert not torch.equal(first, flat(Toy()))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
@pytest.mark.parametrize(("world_size", "bits"), [(2, 1), (3, 4), (4, 32), (8, 4), (16, 1)])
def test_conservation_across_ranks(world_size: int, bits: int, pattern: str, per_host: int) -> None:
    """Σ sent + Σ residuals = Σ what entered, whatever owners drop and round."""
    config = dgc.DGC(
        **SMALL, pattern=pattern, value_bits=bits, momentum_correction=False, fold_lr=False
    )

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

    results = run_ranks(world_size, body, per_host_that_fits(per_host, world_size))
    entered = torch.stack([each[0] for each in results]).sum(0)
    kept = torch.stack([each[2].double() for each in results]).sum(0)
    error = (world_size * results[0][1] + kept - entered).abs()
    scale = torch.stack([each[0].abs() for each in results]).sum(0).clamp(min=1)
    assert float((error / scale).max()) <= 1e-5


@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_density_one_is_dense_sgd(world_size: int, pattern: str, per_host: int) -> None:
    config = dgc.DGC(pattern=pattern, density=1.0, momentum_masking=False, value_bits=32)

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        train(model, wrap(model, config, comm, {"lr": 0.1, "momentum": 0.9}), range(20))
        return flat(model)

    found = run_ranks(world_size, body, per_host_that_fits(per_host, world_size))[0]
    model = Toy()
    sgd = sgd_of(model, {"lr": 0.1, "momentum": 0.9})
    for step in range(20):
        everybody = zip(*(gradients(step, rank) for rank in range(world_size)), strict=True)
        sgd.zero_grad()
        model.loss([torch.stack(each).mean(0) for each in everybody]).backward()
        sgd.step()
    assert float((found - flat(model)).norm()) <= 1e-6 * float(flat(model).norm())


@pytest.mark.parametrize("clip_norm", [None, 3.0])  # to clip, the whole gradient is looked at
@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
def test_a_rank_that_is_not_finite_makes_all_skip(
    pattern: str, per_host: int, clip_norm: float | None
) -> None:
    # in the others' buckets something was sent
    config = dgc.DGC(**SMALL, pattern=pattern, bucket_bytes=32, clip_norm=clip_norm)

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

    results = run_ranks(4, body, per_host)
    assert [each[1:] for each in results] == [(1, True)] * 4
    assert all(torch.equal(results[0][0], each[0]) for each in results)
    assert bool(results[0][0].isfinite().all())


@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
def test_a_skipped_step_loses_nothing(pattern: str, per_host: int) -> None:
    """What entered in the skipped step, where it was finite, is sent later."""
    config = dgc.DGC(
        **SMALL, pattern=pattern, bucket_bytes=32, momentum_correction=False, fold_lr=False
    )

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm, {"momentum": 0.0})

        def find(step: int, rank: int) -> list[Tensor]:
            found = [torch.zeros_like(g) for g in gradients(step, rank)]
            found[0][2, 3] = torch.inf if rank == 1 else 0.0
            return found

        train(model, optimizer, range(3))
        before = optimizer.state_dict()["memory"]
        train(model, optimizer, range(3, 4), find)
        after = optimizer.state_dict()["memory"]
        joined = [torch.cat([each[name]["v"] for name in each]) for each in (before, after)]
        return joined[0], joined[1]

    results = run_ranks(4, body, per_host)
    before, after = (torch.stack(each).double().sum(0) for each in zip(*results, strict=True))
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max().clamp(min=1))


@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
def test_stats_count_what_was_sent(pattern: str, per_host: int) -> None:
    config = dgc.DGC(**SMALL, pattern=pattern, bucket_bytes=100)

    def body(comm: ThreadCommunicator) -> tuple[int, int, int]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        parts = comm.parts
        train(model, optimizer, range(1))  # brings a memory to its place
        for each in (comm, *parts):
            each.sent_bytes = 0
        before = optimizer.stats()
        train(model, optimizer, range(1, 5))
        after = optimizer.stats()
        sent, local = (int(after[k]) - int(before[k]) for k in ("sent_bytes", "local_bytes"))
        several = [each for each in (comm, *parts) if each.world_size > 1]
        return sent, local, sum(each.sent_bytes for each in several)

    for sent, local, seen in run_ranks(4, body, per_host):
        assert sent + local == seen > 0
        assert bool(local) == (pattern == "hierarchical" and per_host > 1)


@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
def test_a_tensor_that_no_rank_uses_stays_as_it_was(pattern: str, per_host: int) -> None:
    config = dgc.DGC(**SMALL, pattern=pattern)

    def find(step: int, rank: int) -> list[Tensor | None]:
        first, *others = gradients(step, rank)
        return [None if step >= 3 else first, *others]

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model = Toy()
        optimizer = wrap(model, config, comm)
        train(model, optimizer, range(3), find)
        before = optimizer.state_dict()["memory"]["a_weight"]["v"]
        was = model.a_weight.detach().clone()
        train(model, optimizer, range(3, 6), find)
        assert torch.equal(was, model.a_weight)
        return before, optimizer.state_dict()["memory"]["a_weight"]["v"]

    for before, after in run_ranks(4, body, per_host):
        assert torch.equal(before, after)


def test_hosts_of_different_size_are_refused_by_name() -> None:
    config = dgc.DGC(**SMALL, pattern="hierarchical")
    with pytest.raises(dgc.DGCError, match="needs the same number on each"):
        run_ranks(3, lambda comm: wrap(Toy(), config, comm), per_host=2)


@pytest.mark.parametrize(("pattern", "per_host"), PATTERNS)
def test_empty_selections_pass(pattern: str, per_host: int) -> None:
    """Zero gradients select nothing worth sending, and a rank may have no gradient at all."""
    config = dgc.DGC(**SMALL, pattern=pattern)

    def find(step: int, rank: int) -> list[Tensor | None]:
        found = [torch.zeros_like(g) for g in gradients(step, rank)]
        return [None, *found[1:]] if rank else [*found]

    def body(comm: ThreadCommunicator) -> Tensor:
        model = Toy()
        optimizer = wrap(model, config, comm, {"momentum": 0.9})
        train(model, optimizer, range(4), find)
        return flat(model)

    for found in run_ranks(4, body, per_host):
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
