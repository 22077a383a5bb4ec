"""Scores of layers pruned alone, and densities that spend a budget."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dgc.errors import ConfigError
from dgc.model import Sensitivity, densities, prune, sensitivity, share


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))


def test_each_layer_is_pruned_alone_and_restored() -> None:
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen: list[dict[str, float]] = []

    def evaluate(m: nn.Module) -> float:
        seen.append(densities(m))
        return 0.0

    sensitivity(model, evaluate, density=[0.5, 0.1])
    assert seen == [
        {"0.weight": 1.0, "2.weight": 1.0},
        {"0.weight": 0.5, "2.weight": 1.0},
        {"0.weight": 0.1, "2.weight": 1.0},
        {"0.weight": 1.0, "2.weight": 0.5},
        {"0.weight": 1.0, "2.weight": 0.1},
    ]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_failing_evaluation_leaves_the_model_as_it_was() -> None:
    model, calls = make(), iter([1.0])
    before = model[0].weight.detach().clone()
    with pytest.raises(StopIteration):
        sensitivity(model, lambda m: next(calls))
    assert torch.equal(model[0].weight, before)


def test_the_result_is_what_prune_takes() -> None:
    model = make()
    x = torch.randn(50, 20)
    target = model(x).detach()
    found = sensitivity(
        model, lambda m: -float((m(x) - target).detach().square().mean()), budget=0.3
    )
    prune(model, density=found)
    kept = sum(int((model[i].weight != 0).sum()) for i in (0, 2))
    assert kept == pytest.approx(0.3 * 750, abs=2)


@given(
    st.lists(
        st.tuples(st.integers(10, 10**6), st.floats(0, 50), st.floats(0, 50)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.002, 1.0),
)
def test_the_budget_is_met_and_no_exchange_helps(
    layers: list[tuple[int, float, float]], budget: float
) -> None:
    scores = {str(i): {0.5: 90 - a, 0.1: 90 - a - b} for i, (_, a, b) in enumerate(layers)}
    numels = {str(i): n for i, (n, _, _) in enumerate(layers)}
    found = Sensitivity(90.0, scores, numels, budget)
    spent = sum(numels[n] * d for n, d in found.items()) / sum(numels.values())
    assert spent == pytest.approx(budget, rel=1e-6)
    assert all(0.002 <= d <= 1 for d in found.values())
    inner = [n for n, d in found.items() if 0.0021 < d < 0.999]
    # Where no bound holds, the marginal loss of a weight, s/d²/n, is the same in all layers.
    wish = found._wishes()
    ratios = [found[n] / wish[n] for n in inner]
    assert all(r == pytest.approx(ratios[0], rel=1e-6) for r in ratios)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_layer_that_breaks_the_model_is_kept_dense(bad: float) -> None:
    model = make()

    def evaluate(m: nn.Module) -> float:
        return bad if densities(m)["2.weight"] < 0.2 else 90 - densities(m)["0.weight"]

    found = sensitivity(model, evaluate, density=[0.5, 0.1], budget=0.4)
    assert found == {"0.weight": pytest.approx(0.25), "2.weight": 1.0}
    assert found.allocate(0.1)["0.weight"] == pytest.approx(0.002)
    found = Sensitivity(1.0, {"a": {0.5: bad}, "b": {0.5: bad}}, {"a": 100, "b": 100}, 0.3)
    assert found == pytest.approx({"a": 0.3, "b": 0.3})


def test_weights_without_elements_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 0))
    assert sensitivity(model, lambda m: 1.0).keys() == {"1.weight"}


def test_faults_of_the_user() -> None:
    for score in ("nan", "-inf"):
        with pytest.raises(ConfigError, match=f"evaluate gives {score}"):
            sensitivity(make(), lambda m, score=score: float(score))
    with pytest.raises(ConfigError, match="prune before share"):
        sensitivity(share(make(), {"2": 3}), lambda m: 0.0)
    with pytest.raises(ConfigError, match=r"in \(0, 1\)"):
        sensitivity(make(), lambda m: 0.0, density=1.0)
    with pytest.raises(ConfigError, match="budget is 2"):
        sensitivity(make(), lambda m: 0.0, budget=2.0)


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sensitivity(make(), lambda m: 1.0, density=[0.5, 0.1]).plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
