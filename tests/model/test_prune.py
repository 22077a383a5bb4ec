"""What is pruned, when, and what counts as a user's fault."""

import math

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

from dgc.errors import ConfigError
from dgc.model import (
    cubic_density,
    densities,
    distill,
    import_masks,
    l1_penalty,
    l2_penalty,
    prune,
    prune_by_std,
    prune_iteratively,
    share,
)
from dgc.model.constrain import constrained


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))


def with_nan(model: nn.Sequential) -> nn.Sequential:
    model[2].weight.data[3, 3] = torch.nan
    return model


def own_buffer(model: nn.Sequential, name: str) -> nn.Sequential:
    model[2].register_buffer(name, torch.ones(3))
    return model


def test_the_largest_of_each_layer_are_kept() -> None:
    model, dense = make(), make()
    prune(model, density=0.25)
    for index in (0, 2):
        weight, original = model[index].weight, dense[index].weight
        kept = weight != 0
        assert int(kept.sum()) == math.ceil(0.25 * weight.numel())
        assert original[kept].abs().min() >= original[~kept].abs().max()
        assert torch.equal(weight[kept], original[kept])
        assert torch.equal(model[index].bias, dense[index].bias)


def test_layers_compete_in_global_scope() -> None:
    model = make()
    model[2].weight.data.mul_(10_000)
    prune(model, density=0.25, scope="global")
    assert int((model[2].weight != 0).sum()) == 150
    assert sum(int((model[i].weight != 0).sum()) for i in (0, 2)) == math.ceil(0.25 * 750)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_structure_against_a_loop(scope: str) -> None:
    model, weight = nn.Sequential(nn.Conv2d(3, 8, 2)), make()[0].weight.detach()[:8, :12]
    model[0].weight.data.copy_(weight.reshape(8, 3, 2, 2))
    scores = torch.zeros(8, 12)
    for i in range(8):
        for j in range(12):
            scores[i, j] = weight[i, j].abs() * (weight[i].norm() * weight[:, j].norm()) ** 0.7
    structure = 0.7 if scope == "global" else {"0": 0.7}
    prune(model, density=0.25, scope=scope, structure=structure)
    kept = (model[0].weight != 0).view(8, 12)
    assert torch.equal(kept, scores >= scores.view(-1).topk(24).values[-1])
    assert not torch.equal(kept, weight.abs() >= weight.abs().view(-1).topk(24).values[-1])


def test_structure_is_for_named_weights_and_no_biases() -> None:
    model, other, plain = make(), make(), make()
    prune(model, {"0": 0.2, "0.bias": 0.5, "2": 0.2}, structure={"0": 1.0})
    prune(other, {"0.bias": 0.5}, structure=1.0)
    prune(plain, {"0": 0.2, "0.bias": 0.5, "2": 0.2})
    assert torch.equal(model[2].weight, plain[2].weight)
    assert torch.equal(model[0].bias, plain[0].bias)
    assert torch.equal(other[0].bias, plain[0].bias)
    assert not torch.equal(model[0].weight, plain[0].weight)
    assert int((model[0].weight.abs().sum(1) == 0).sum()) > int(
        (plain[0].weight.abs().sum(1) == 0).sum()
    )


def test_names_of_layers_and_parameters() -> None:
    model = prune(make(), density={"0": 0.1, "2.weight": 0.5, "0.bias": 0.5})
    assert densities(model) == {"0.weight": 0.1, "2.weight": 0.5}
    assert int((model[0].bias != 0).sum()) == 15


def test_pruning_again_only_removes() -> None:
    model = prune(make(), density=0.5)
    first = model[0].weight != 0
    prune(model, density=0.9)
    assert torch.equal(model[0].weight != 0, first)
    prune(model, density=0.2)
    second = model[0].weight != 0
    assert int(second.sum()) == 120
    assert bool((first | ~second).all())


def test_quality_times_standard_deviation() -> None:
    model, dense = make(), make()
    prune_by_std(model, {"0": 1.2})
    original = dense[0].weight.detach()
    mean = original.mean()
    std = math.sqrt(float((original - mean).square().mean()))
    assert torch.equal(model[0].weight != 0, original.abs() >= 1.2 * std)
    assert densities(model)["2.weight"] == 1.0


def test_masks_of_torch_are_taken_over() -> None:
    model = make()
    torch_prune.l1_unstructured(model[0], "weight", amount=0.75)
    parameter = model[0].weight_orig
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kept = model[0].weight != 0
    import_masks(model)
    assert model[0].weight is parameter
    model(torch.randn(3, 20)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight != 0, kept)


def test_cubic_schedule() -> None:
    values = [cubic_density(s, 10, 110, final=0.05, initial=0.8) for s in range(121)]
    assert values[0] == values[10] == 0.8
    assert values[110] == values[120] == 0.05
    assert values[60] == pytest.approx(0.05 + 0.75 / 8)
    assert values == sorted(values, reverse=True)


def test_iterative_pruning_retrains_in_between() -> None:
    seen: list[float] = []
    prune_iteratively(make(), [0.5, 0.2, 0.1], lambda m: seen.append(densities(m)["0.weight"]))
    assert seen == [0.5, 0.2, 0.1]


def test_penalties() -> None:
    model = make()
    weights = [model[0].weight.detach().double(), model[2].weight.detach().double()]
    assert l1_penalty(model).item() == pytest.approx(sum(float(w.abs().sum()) for w in weights))
    assert l2_penalty(model).item() == pytest.approx(sum(float((w * w).sum()) for w in weights))


def test_distillation_against_a_loop() -> None:
    torch.manual_seed(1)
    logits, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (6,))
    soft = hard = 0.0
    for row in range(6):
        p = [math.exp(float(x) / 2.5) for x in teacher[row]]
        q = [math.exp(float(x) / 2.5) for x in logits[row]]
        e = [math.exp(float(x)) for x in logits[row]]
        for i in range(4):
            soft += p[i] / sum(p) * math.log(p[i] / sum(p) / (q[i] / sum(q))) / 6
        hard -= math.log(e[int(labels[row])] / sum(e)) / 6
    loss = distill(logits, teacher, labels, temperature=2.5, weight=0.7)
    assert loss.item() == pytest.approx(0.7 * 2.5**2 * soft + 0.3 * hard)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: prune(m, 0.0), r"0\.weight is 0\.0.*\(0, 1\]"),
        (lambda m: prune(m, {"fc9": 0.1}), "no parameter 'fc9'.*0.weight"),
        (lambda m: prune(m, {"0": 0.1}, scope="global"), "one number"),
        (lambda m: prune(m, 0.5, scope="all"), "'layer' or 'global'"),
        (lambda m: prune(m, 0.5, structure=-1.0), r"structure of 0\.weight is -1\.0.*0 or more"),
        (lambda m: prune(m, 0.5, structure={"9": 1.0}), "no parameter .9. for structure"),
        (lambda m: prune(m[1], 0.5), "no weights of more than a column"),
        (lambda m: prune(share(m, 2), 0.5), "prune before share"),
        (lambda m: prune(share(m, {"2": 2}), 0.5), "prune before share"),
        (lambda m: prune(own_buffer(m, "weight_mask"), 0.5), "Linear has a 'weight_mask'"),
        (lambda m: prune_by_std(m, -1.0), "0 or more"),
        (lambda m: prune_by_std(m, float("nan")), "0 or more"),
        (lambda m: prune_by_std(with_nan(m), 1.0), "1 elements of 2.weight are not finite"),
        (lambda m: cubic_density(1, 5, 5, final=0.1), "begin < end"),
        (lambda m: share(m, 9), "1 to 8"),
        (lambda m: share(m, {"0": 3, "2": 9}), "1 to 8"),
        (lambda m: share(m, 5.0), "1 to 8"),
        (lambda m: share(with_nan(m), 3), "1 elements of 2.weight are not finite"),
        (lambda m: share(own_buffer(m, "weight_codes"), 3), "Linear has a 'weight_codes'"),
        (lambda m: share(m, 4, penalty={"fc9": 0.1}), "no parameter 'fc9' for penalty"),
        (lambda m: share(m, 4, penalty=float("nan")), "0 or more"),
        (lambda m: share(m, 4, init="best"), "kmeans"),
        (lambda m: share(m, 4, penalty=-1.0), "0 or more"),
        (
            lambda m: distill(m[0].bias, m[0].bias, m[0].bias, temperature=0.0, weight=0.5),
            "temperature 0.0",
        ),
    ],
)
def test_faults_of_the_user(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(make())  # type: ignore[operator]


@pytest.mark.parametrize(
    "call",
    [
        lambda m: share(m, {"0": 3, "2": 9}),
        lambda m: share(with_nan(m), 3),
        lambda m: share(own_buffer(m, "weight_codes"), 3),
        lambda m: prune(own_buffer(m, "weight_mask"), 0.5),
        lambda m: prune(with_nan(m), 0.5),
        lambda m: prune_by_std(with_nan(m), 1.0),
    ],
)
def test_a_fault_of_the_second_layer_leaves_the_first_alone(call: object) -> None:
    model = make()
    with pytest.raises(ConfigError):
        call(model)  # type: ignore[operator]
    assert not constrained(model)
    assert torch.equal(model[0].weight, make()[0].weight)


def test_gains_stored_as_columns_and_empty_weights_are_kept() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(100, 50))
    assert densities(prune(normed, 0.1)) == {"parametrizations.weight.original1": 0.1}
    assert bool((normed.parametrizations.weight.original0 != 0).all())
    model = nn.ModuleList([nn.Embedding(0, 5), nn.Linear(5, 5)])
    assert int(prune(model, 0.2)[1].weight.count_nonzero()) == 5
    assert share(model, 2)[0].weight.shape == (0, 5)
