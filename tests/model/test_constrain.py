"""Masks and shared values hold under optimizers, state dicts, copies and DDP."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgc.errors import ConfigError
from dgc.model import load, prune, release, save, share
from dgc.model.constrain import constrained
from tests.processes import run_processes

OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    lambda p: torch.optim.Adagrad(p, lr=0.1),
]


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def pruned_stay_zero(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert bool((weight[~mask] == 0).all()), name
        assert bool((weight[mask] != 0).any()), name


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(name) != 0 for name in ("0.weight", "2.weight")}


def groups_agree(model: nn.Module) -> None:
    for module, constraint in constrained(model):
        codes = constraint.buffer(module)
        weight = module.get_parameter(constraint.name)
        assert bool((weight[codes == 0] == 0).all())
        for code in codes.unique():
            assert weight[codes == code].unique().numel() == 1


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_masks_hold_although_momentum_was_gathered_before(
    make_optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    model = make()
    optimizer = make_optimizer(model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    masks = masks_of(prune(model, density=0.3))
    assert sum(int(m.sum()) for m in masks.values()) == 58 + 20
    before = model[0].weight.detach().clone()
    for seed in range(3):
        step(model, optimizer, seed)
        pruned_stay_zero(model, masks)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_shared_values_stay_equal_although_momentum_was_gathered_before(
    make_optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    model = prune(make(), density=0.5)
    optimizer = make_optimizer(model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    share(model, bits=2)
    before = model[0].weight.detach().clone()
    for seed in range(3):
        step(model, optimizer, seed)
        groups_agree(model)
    assert not torch.equal(model[0].weight, before)


def test_a_foreign_optimizer_that_writes_data_is_corrected_before_use() -> None:
    model = prune(make(), density=0.3)
    masks = masks_of(model)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    model(torch.zeros(1, 12))
    pruned_stay_zero(model, masks)
    model[0].weight.data.add_(1.0)
    assert bool((model.state_dict()["0.weight"][~masks["0.weight"]] == 0).all())


def test_gradient_accumulation_over_two_forward_passes() -> None:
    """The projection in the second forward pass does not invalidate the first one's graph."""
    model = share(prune(make(), density=0.5), bits=3)
    loss = model(torch.ones(1, 12)).sum() + model(torch.zeros(1, 12)).sum()
    loss.backward()
    assert model[0].weight.grad is not None


def test_shared_gradient_is_the_sum_over_members() -> None:
    model, twin = make(), make()
    share(prune(model, density=0.5), bits=2)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if "codes" not in n})
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for layer, plain in ((model[0], twin[0]), (model[2], twin[2])):
        codes = layer.weight_codes
        for row in range(codes.shape[0]):
            for column in range(codes.shape[1]):
                code = int(codes[row, column])
                total = 0.0
                for r in range(codes.shape[0]):
                    for c in range(codes.shape[1]):
                        if code and int(codes[r, c]) == code:
                            total += float(plain.weight.grad[r, c])
                assert float(layer.weight.grad[row, column]) == pytest.approx(total, abs=1e-5)


def test_projecting_twice_changes_no_bit() -> None:
    torch.manual_seed(1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = share(nn.Linear(300, 100, dtype=dtype), bits=4)
        ((module, constraint),) = constrained(layer)
        first = layer.weight.detach().clone()
        constraint.enforce_(module)
        assert torch.equal(layer.weight, first)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_is_constrained_on_its_own(
    copier: Callable[[nn.Module], nn.Module], shared: bool
) -> None:
    model = prune(make(), density=0.3)
    masks = masks_of(model)
    if shared:
        share(model, bits=2)
    twin = copier(model)
    original = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for seed in range(3):
        step(twin, optimizer, seed)
        pruned_stay_zero(twin, masks)
    if shared:
        groups_agree(twin)
    release(twin)
    assert len(constrained(model)) == 2
    assert all(torch.equal(original[n], t) for n, t in model.state_dict().items())


def test_state_dict_carries_masks_to_another_model() -> None:
    model = prune(make(0), density=0.3)
    twin = prune(make(1), density=0.3)
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    step(twin, optimizer, 0)
    pruned_stay_zero(twin, masks_of(model))


@pytest.mark.parametrize("loaded", [False, True])
def test_an_output_projection_whose_forward_is_never_called_is_bound_in_a_copy(
    loaded: bool, tmp_path: Path
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = prune(Attention(), density=0.5)
    if loaded:
        save(model, tmp_path / "m")
        model = load(Attention(), tmp_path / "m", constrain=True)
    model = copy.deepcopy(model)
    weight = model.attention.out_proj.weight
    mask = weight != 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(2, 3, 8)).square().sum().backward()
    optimizer.step()
    assert bool((weight[~mask] == 0).all())
    assert bool((weight[mask] != 0).all())


def test_lstm_weights_are_constrained() -> None:
    torch.manual_seed(0)
    model = prune(nn.LSTM(6, 5), density=0.4)
    masks = {n: p != 0 for n, p in model.named_parameters() if p.dim() == 2}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 6))[0].square().sum().backward()
        optimizer.step()
    pruned_stay_zero(model, masks)


def test_tied_weights_are_constrained_once() -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embedding.weight
    model = prune(nn.Sequential(embedding, head), density=0.5)
    mask = head.weight != 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    assert int(mask.sum()) == 18
    assert bool((head.weight[~mask] == 0).all())


def test_channels_last_weights() -> None:
    torch.manual_seed(0)
    model = prune(nn.Conv2d(4, 6, 3), density=0.5).to(memory_format=torch.channels_last)
    share(model, bits=2)
    model(torch.randn(2, 4, 5, 5)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    groups_agree(model)


@pytest.mark.parametrize("act", [lambda m: prune(m, 0.5), lambda m: share(m, 1)])
def test_what_was_frozen_at_first_trains_as_what_was_not(act: Callable[..., nn.Module]) -> None:
    def trained(frozen: bool) -> Tensor:
        model = make()
        act(model.requires_grad_(not frozen)).requires_grad_(True)
        step(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), 0)
        assert model[0].weight.grad is not None
        return torch.cat([model[0].weight.detach(), model[0].weight.grad])

    assert torch.equal(trained(frozen=True), trained(frozen=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shared_values_are_means_in_any_precision(dtype: torch.dtype) -> None:
    layer = nn.Linear(200, 200, bias=False).to(dtype)
    layer.weight.data.fill_(0.5)
    share(layer, 1)
    layer.weight.data[:100].add_(1.0)
    assert layer.state_dict()["weight"].unique().tolist() == [1.0]


@pytest.mark.parametrize("init", ["kmeans", "linear", "density"])
@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_sharing_does_not_depend_on_the_scale_of_64_bits(init: str, penalty: float) -> None:
    weight = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared = []
    for exponent in (0, -900, 150, 1000):
        layer = nn.Linear(30, 20, bias=False, dtype=torch.float64)
        layer.weight.data = weight * 2.0**exponent
        share(layer, 3, init=init, penalty=penalty)
        shared.append(layer.weight.detach() / 2.0**exponent)
    assert all(torch.equal(other, shared[0]) for other in shared)
    assert (shared[0] - weight).norm() < 0.4 * weight.norm()


def test_levels_that_are_zero_stay_apart_from_the_pruned() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, -1.0, 0.1, -0.1]]))
    assert share(layer, 2).weight.tolist() == [[1.0, -1.0, pytest.approx(0), pytest.approx(0)]]
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    assert share(layer, 1).weight_codes.tolist() == [[1, 1]]


def test_a_foreign_optimizer_and_a_module_whose_forward_is_never_called() -> None:
    model = prune(nn.MultiheadAttention(8, 2), 0.5)
    x = torch.randn(3, 1, 8)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data.add_(0.1)
        model(x, x, x)
        for name in ("in_proj", "out_proj.", "in_proj", "out_proj."):
            weight = model.get_parameter(f"{name}_weight".replace("._", "."))
            assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("act", [lambda m: prune(m, 0.5), lambda m: share(m, 2)])
def test_functional_calls_take_other_tensors(act: Callable[..., nn.Module]) -> None:
    model, x = act(nn.Linear(4, 2)), torch.ones(1, 4)
    out = torch.func.functional_call(model, {"weight": torch.ones(2, 4)}, (x,))
    assert torch.equal(out, x.new_full((1, 2), 4.0) + model.bias)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grad = torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})
    assert torch.equal(grad["weight"], 2 * model(x).detach().T.expand(2, 4))


def test_a_parametrization_on_top_is_refused() -> None:
    model = prune(nn.Linear(4, 2), 0.5)
    with pytest.raises(ConfigError, match=r"'weight'.*before dgc\.prune"):
        nn.utils.parametrizations.weight_norm(model)(torch.ones(1, 4))


@pytest.mark.parametrize("act", [lambda m: prune(m, 0.5), lambda m: share(m, 2)])
def test_export_says_to_release_first(act: Callable[..., nn.Module]) -> None:
    model, example = act(nn.Linear(8, 2)).eval(), (torch.ones(1, 8),)
    with pytest.raises(ConfigError, match=r"release\(model\)"):
        torch.export.export(model, example)
    expected = model(*example)
    release(model)
    assert torch.equal(torch.export.export(model, example).module()(*example), expected)


def test_sparse_gradients_of_embeddings() -> None:
    model = prune(nn.Embedding(20, 8, sparse=True), 0.5)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert int((model.weight == 0).sum()) == 80
    shared = share(nn.Embedding(20, 8, sparse=True), 3)
    with pytest.raises(ConfigError, match="sparse=False"):
        shared(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("act", [lambda m: prune(m, 0.5), lambda m: share(m, 2)])
def test_second_derivatives(act: Callable[..., nn.Module]) -> None:
    model = act(nn.Linear(8, 2))
    out = model(torch.ones(1, 8)).square().sum()
    (grad,) = torch.autograd.grad(out, model.weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), model.weight)
    assert second.shape == (2, 8)
    assert bool(second.any())


def test_release_leaves_a_plain_model() -> None:
    model = share(prune(make(), density=0.3), bits=2)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    release(model)
    assert list(model.state_dict()) == list(make().state_dict())
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    assert int((model[0].weight != 0).sum()) > 58
    assert not model._forward_pre_hooks


def ddp_rank(wrap_first: bool) -> dict[str, Tensor]:
    rank = dist.get_rank()
    # Different seeds: DDP broadcasts rank 0's weights, and masks made before must follow them.
    model = make(rank)
    if wrap_first:
        ddp = DistributedDataParallel(model)
        prune(model, density=0.3)
    else:
        prune(model, density=0.3)
        ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    step(ddp, optimizer, rank)
    masks = masks_of(model)
    share(model, bits=3)
    for turn in range(3):
        step(ddp, optimizer, 10 * turn + rank)
        pruned_stay_zero(model, masks)
        groups_agree(model)
    return dict(model.state_dict())


def test_two_ddp_ranks_stay_equal_and_constrained() -> None:
    checks = {f"wrap first: {first}": partial(ddp_rank, first) for first in (True, False)}
    for name, (first, second) in run_processes(2, checks).items():
        assert isinstance(first, dict), f"{name}\n{first}"
        assert isinstance(second, dict), f"{name}\n{second}"
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first)
