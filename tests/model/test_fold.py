"""What `fold` may remove, and that nothing else changes."""

import pytest
import torch
from torch import Tensor, nn

from dgc.errors import ConfigError
from dgc.model import fold, prune, share

ACTIVATIONS = [
    [nn.ReLU(inplace=True)],
    [nn.Sigmoid()],
    [nn.Tanh(), nn.Dropout(0.5), nn.Softplus()],
    [],
]


def make(between: list[nn.Module], bias: bool = True) -> nn.Sequential:
    """Units 0 to 3 of 8 have no inputs, unit 7 has no reader; weights are pruned already."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 3, bias=bias))
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[-1].weight[:, 7] = 0
    return prune(model, {"0": 24 / 48, f"{len(between) + 1}": 21 / 24}).eval()


@pytest.mark.parametrize("between", ACTIVATIONS)
def test_outputs_stay(between: list[nn.Module]) -> None:
    model, x = make(between), torch.randn(50, 6)
    before = model(x)
    fold(model)
    assert_cut_off(model)
    assert model(x).allclose(before, atol=1e-6)
    bias = model[-1].bias.clone()
    fold(model)
    assert torch.equal(model[-1].bias, bias)


def assert_cut_off(model: nn.Sequential) -> None:
    first, second = model[0], model[-1]
    assert [i for i in range(8) if first.bias[i]] == [4, 5, 6]
    assert [i for i in range(8) if first.weight[i].any()] == [4, 5, 6]
    assert [i for i in range(8) if second.weight[:, i].any()] == [4, 5, 6]


@pytest.mark.parametrize("between", ACTIVATIONS[:2])
def test_what_is_folded_trains_no_more(between: list[nn.Module]) -> None:
    model = make(between)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(6):
        if step == 3:  # with momentum gathered before
            fold(model)
        optimizer.zero_grad()
        model(torch.randn(20, 6)).square().sum().backward()
        optimizer.step()
    assert_cut_off(model)


def test_its_share_goes_to_other_weights() -> None:
    model, wasteful = fold(make([nn.ReLU()])), make([nn.ReLU()])
    for each in (model, wasteful):
        prune(each, {"2": 6 / 24})
    assert wasteful[2].weight[:, :4].any()
    assert not model[2].weight[:, :4].any()
    assert int((model[2].weight != 0).sum()) == 6


def test_a_constant_stays_where_the_next_layer_has_no_bias() -> None:
    model, x = make([nn.Sigmoid()], bias=False), torch.randn(50, 6)
    before, bias = model(x), model[0].bias.clone()
    fold(model)
    assert torch.equal(model(x), before)
    assert torch.equal(model[0].bias, bias.index_fill(0, torch.tensor(7), 0))


@pytest.mark.parametrize("held", ["pruned", "shared"])
def test_a_constant_stays_where_the_next_bias_is_not_free(held: str) -> None:
    model, x = make([nn.Sigmoid()]), torch.randn(50, 6)
    prune(model, {"2.bias": 0.4}) if held == "pruned" else share(model, {"2.bias": 1})
    before = model(x)
    fold(model)
    assert torch.equal(model(x), before)


def test_a_chain_folds_again_and_again() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4)]
    model, x = nn.Sequential(*layers), torch.randn(50, 6)
    for density in (0.3, 0.2, 0.1, 0.05):
        prune(model, density)
        before = model(x)
        fold(model)
        assert model(x).allclose(before, atol=1e-6)
        fed = model[2].weight.any(1)
        assert torch.equal(model[2].bias != 0, fed & model[4].weight.any(0))
        assert not model[4].weight[:, ~fed].any()
        assert not model[2].weight[:, ~model[0].weight.any(1)].any()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "between", [[nn.Softmax(1)], [nn.PReLU(8)], [Scaled(8, 8)], [nn.ReLU(), nn.LayerNorm(8)]]
)
def test_other_layers_between_are_left_alone(between: list[nn.Module]) -> None:
    model = make(between)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = fold(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("before", [True, False])
def test_layers_with_hooks_are_left_alone(at: int, before: bool) -> None:
    model, x = make([nn.Sigmoid()]), torch.randn(50, 6)
    if before:
        model[at].register_forward_pre_hook(lambda layer, inputs: inputs[0] + 1)
    else:
        model[at].register_forward_hook(lambda layer, inputs, output: output + 1)
    expected = model(x)
    assert torch.equal(fold(model)(x), expected)


def test_only_pruned_layers_are_touched() -> None:
    """An output layer is often zero at the start: its inputs are needed all the same."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    prune(model, {"0": 0.5})
    kept = model[0].weight.clone()
    assert torch.equal(fold(model)[0].weight, kept)


def test_shared_biases_are_refused() -> None:
    model = make([nn.ReLU()])
    share(model, {"0.bias": 2})
    bias = model[2].bias.clone()
    with pytest.raises(ConfigError, match="prune before share"):
        fold(model)
    assert torch.equal(model[2].bias, bias)


class Skip(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self[1](self[0](x)).sum()


def reused() -> nn.Module:
    model = make([nn.ReLU()])
    return nn.Sequential(model, nn.Linear(3, 6), nn.Sequential(model[0], nn.Linear(8, 2)))


def tied() -> nn.Module:
    first = make([nn.ReLU()])
    again = nn.Linear(8, 3)
    again.weight = first[-1].weight
    return nn.ModuleDict({"first": first, "again": again})


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(layer := prune(nn.Linear(6, 6), 0.05), nn.ReLU(), layer),
        Skip(*make([nn.ReLU()])),
        reused(),
        tied(),
    ],
)
def test_what_is_used_twice_or_in_another_way_is_left_alone(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
