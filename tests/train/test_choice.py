"""The choice of a pattern: each outcome by synthetic costs, and changes of pattern on the way."""

import pytest
import torch
from torch import Tensor

import dgc
from dgc.comm.cost import Link, Links
from dgc.train import patterns
from dgc.train.choice import Coding, Costs, choose, predict
from tests.threads import ThreadCommunicator, run_ranks
from tests.workers import Toy, flat, gradients, train, wrap

SIZES = [(6_000_000, 1000), (500_000,)]
MEMORY = Links(Link(1e-5, 2e-10), Link(1e-5, 2e-10))  # ranks of one host
SLOW = Links(Link(1e-4, 8e-8), Link(1e-4, 8e-8))  # 100 Mbit/s
CODING = Coding(element=1e-9, sent=4e-8, clear=3e-10, arrived=2e-8, dense=1e-9)


def costs(ranks: int, links: Links, hosts: int = 1, coding: Coding = CODING) -> Costs:
    several = 1 < hosts < ranks
    return Costs(ranks, hosts, links, *((MEMORY, links) if several else (None, None)), coding)


@pytest.mark.parametrize(
    ("wanted", "made", "density"),
    [
        ("all-gather", costs(4, SLOW), 0.001),
        ("dense", costs(4, MEMORY, coding=CODING._replace(element=1e-8)), 0.001),
        ("dense", costs(4, MEMORY), 0.25),
        ("hierarchical", costs(32, SLOW, hosts=4), 0.001),
        ("re-selecting", costs(1024, Links(Link(1e-7, 8e-8), Link(1e-7, 8e-8))), 0.001),
        ("re-selecting", costs(64, Links(Link(1e-7, 8e-8), Link(1e-7, 1e-6))), 0.001),
    ],
)
def test_each_outcome_has_its_costs(wanted: str, made: Costs, density: float) -> None:
    assert choose(predict(made, SIZES, density, dgc.DGC())) == wanted


def test_shared_indices_are_never_chosen_however_fast() -> None:
    made = costs(1024, Links(Link(1e-7, 8e-8), Link(1e-7, 8e-8)))
    predicted = predict(made, SIZES, 0.001, dgc.DGC())
    assert min(predicted, key=predicted.__getitem__) == "shared-indices" != choose(predicted)


def test_predictions_are_the_formulas() -> None:
    """Without coding: what the docstrings of the patterns say."""
    free = Coding(0.0, 0.0, 0.0, 0.0, 0.0)
    link = Links(Link(1.0, 0.0), Link(1.0, 0.0))  # counts messages
    found = predict(costs(8, link, coding=free), [(1000,)], 0.01, dgc.DGC())
    assert found == {
        "all-gather": 7.0,
        "dense": 14.0,
        "shared-indices": 3.0 + 14.0,
        "re-selecting": 14.0 + 7.0 + 7.0 + 7.0,
    }


def test_measured_costs_are_equal_on_all_ranks() -> None:
    config = dgc.DGC()

    def body(comm: ThreadCommunicator) -> Costs:
        return patterns.Patterns(
            dgc.DGC(pattern="auto"), comm, [(30_000, 100)], torch.device("cpu")
        ).costs  # type: ignore[return-value]

    first, *others = run_ranks(4, body, per_host=2)
    assert all(other == first for other in others)
    assert (first.ranks, first.hosts) == (4, 2)
    assert first.inside is not None
    assert all(time > 0 for time in predict(first, [(30_000, 100)], 0.01, config).values())


SCRIPT = ["all-gather", "hierarchical", "dense", "shared-indices", "re-selecting"]


@pytest.mark.parametrize("turn", range(5))
def test_a_change_of_pattern_loses_nothing(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage of the warm-up by another pattern: the law of conservation holds across them."""
    order = SCRIPT[turn:] + SCRIPT[:turn]
    config = dgc.DGC(
        density=0.02,
        min_selected=1,
        warmup_density=0.5,
        warmup_steps=16,
        pattern="auto",
        momentum_correction=False,
        fold_lr=False,
    )
    seen: dict[float, str] = {}

    def scripted(self: patterns.Patterns, density: float) -> str:
        return seen.setdefault(density, order[len(seen) % len(order)])

    monkeypatch.setattr(patterns.Patterns, "choose", scripted)

    def body(comm: ThreadCommunicator) -> tuple[Tensor, Tensor, Tensor, set[str]]:
        model, used = Toy(), set()
        optimizer = wrap(model, config, comm, {"momentum": 0.0})
        entered, sent = torch.zeros(2, flat(model).numel(), dtype=torch.float64)
        for step in range(24):
            found = gradients(step, comm.rank)
            entered += torch.cat([g.view(-1) for g in found])
            optimizer.zero_grad()
            model.loss(found).backward()
            optimizer.synchronize()
            sent += torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
            optimizer.step()
            used.add(str(optimizer.stats()["pattern"]))
        memory = optimizer.state_dict()["memory"]
        return entered, sent, torch.cat([memory[n]["v"] for n, _ in model.named_parameters()]), used

    results = run_ranks(4, body, per_host=2)
    assert len(results[0][3]) >= 4
    entered, kept = (sum(each[i].double() for each in results) for i in (0, 2))
    error = (4 * results[0][1] + kept - entered).abs().max()
    assert float(error) <= 1e-5 * float(entered.abs().max())


def test_rank_0_says_it_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def body(comm: ThreadCommunicator) -> tuple[str, Tensor]:
        model = Toy()
        optimizer = wrap(model, dgc.DGC(pattern="auto", density=0.1), comm)
        train(model, optimizer, range(4))
        return str(optimizer.stats()["pattern"]), flat(model)

    results = run_ranks(3, body)
    line, *more = [x for x in capfd.readouterr().err.splitlines() if x.startswith("dgc:")]
    assert not more
    assert f"at density 0.1 {results[0][0]}, predicted" in line
    assert all(name in line for name in ("all-gather", "dense", "shared-indices", "re-selecting"))
    assert all(torch.equal(results[0][1], each[1]) for each in results)


def test_alone_nothing_is_measured_or_said(capfd: pytest.CaptureFixture[str]) -> None:
    model = Toy()
    train(model, wrap(model, dgc.DGC(pattern="auto"), None), range(2))
    assert capfd.readouterr().err == ""
