"""Weights that are huge, tiny, of few values, tied, put in or parametrized since."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import dgc
from dgc.core import codebook
from dgc.errors import ConfigError, StateError
from dgc.model import prune, release, save, share


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.t().shape, bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """k-means goes by runs for small layers too."""
    for name, size in {"EXACT_WORK": 64, "COARSE_RUNS": 1 << 7, "FINE_RUNS": 1 << 10}.items():
        monkeypatch.setattr(codebook, name, size)


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_large_weights_stay_finite(dtype: torch.dtype) -> None:
    drawn = torch.rand(80, 50, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    layer = share(linear(drawn * 3e38), 5)
    assert layer.weight.isfinite().all()
    assert layer.weight.unique().numel() <= 32
    assert ((layer.weight - drawn * 3e38).abs() <= 3e37).all()


@pytest.mark.usefixtures("runs")
def test_one_large_value_beside_zeros() -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((70, 70), lowest).triu(1)
    assert torch.equal(share(linear(mask), 5).weight, mask)


def test_shared_again_the_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "CHUNK", 100)
    layer = share(nn.Linear(80, 50, bias=False), 5)
    before = layer.weight.detach().clone()
    assert torch.equal(share(layer, 5).weight, before)


def clusters(count: int, width: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(count, generator=generator)
    chosen = torch.randint(count, (20_000,), generator=generator)
    return middles[chosen] + width * torch.randn(20_000, generator=generator)


def test_levels_find_narrow_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    values = clusters(40, 1e-5)

    def error() -> float:
        levels = codebook.kmeans_levels(values, 63)
        return float(
            (values.double() - levels[codebook.nearest(values, levels).long()]).square().sum()
        )

    exact = error()
    for name, size in {"EXACT_WORK": 64, "COARSE_RUNS": 1 << 10, "FINE_RUNS": 1 << 13}.items():
        monkeypatch.setattr(codebook, name, size)
    assert error() <= 2 * exact


@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1e-5, 1e20, 1e100])
def test_structure_does_not_go_by_the_scale(scale: float) -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = prune(linear(weight), 0.2, structure=0.5).weight != 0
    for dtype in (torch.float64, torch.float32):
        scaled = (weight * scale).to(dtype)
        if bool(scaled.all() & scaled.isfinite().all()):
            assert torch.equal(prune(linear(scaled), 0.2, structure=0.5).weight != 0, wanted)


def test_layers_compete_by_their_scale_with_structure() -> None:
    small, large = nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)
    large.weight.data.mul_(100)
    model = prune(nn.Sequential(small, large), 0.4, scope="global", structure=0.5)
    assert not small.weight.any()
    assert model[1] is large
    assert int(large.weight.count_nonzero()) == 320


def test_another_models_parameters_are_left_alone() -> None:
    pruned, other = prune(nn.Linear(4, 4), 0.25), nn.Linear(4, 4)
    before, x = other.weight.detach().clone(), torch.ones(1, 4)
    found = torch.func.functional_call(pruned, dict(other.named_parameters()), x)
    assert torch.equal(found, other(x))
    assert torch.equal(other.weight, before)
    other(x).sum().backward()
    assert other.weight.grad is not None
    assert bool(other.weight.grad.all())
    own = torch.func.functional_call(pruned, dict(pruned.named_parameters()), x)
    assert torch.equal(own, pruned(x))


@pytest.mark.parametrize(
    "parametrized", [torch_prune.identity, nn.utils.parametrizations.weight_norm]
)
def test_a_layer_that_was_parametrized_since_can_be_released(parametrized: object) -> None:
    layer = prune(nn.Linear(8, 8), 0.5)
    parametrized(layer, "weight")  # type: ignore[operator]
    for call in (layer.state_dict, lambda: layer(torch.ones(1, 8))):
        with pytest.raises(ConfigError, match="no longer a parameter"):
            call()
    release(layer)
    layer(torch.ones(1, 8))
    layer.state_dict()


class Two(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
        if tied:
            self.b.weight = self.a.weight


def test_a_file_of_two_is_not_loaded_into_one(tmp_path: Path) -> None:
    save(Two(False), tmp_path / "two.dgc")
    model = Two(True)
    before = model.a.weight.detach().clone()
    with pytest.raises(StateError, match="are one tensor"):
        dgc.load(model, tmp_path / "two.dgc")
    assert torch.equal(model.a.weight, before)
    save(model, tmp_path / "one.dgc")
    assert torch.equal(dgc.load(Two(False), tmp_path / "one.dgc").b.weight, before)


def test_what_cannot_be_shared_is_refused_before_anything_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 1).expand(4, 4))
    before = model[0].weight.detach().clone()
    with pytest.raises(ConfigError, match="share memory"):
        share(model, 2)
    assert torch.equal(model[0].weight, before)
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ConfigError, match=r"torch\.int64"):
        share(model, {"0": 2, "1": 2})
    with pytest.raises(ConfigError, match="twice"):
        prune(model, {"0": 0.5, "0.weight": 0.1})
    assert torch.equal(model[0].weight, before)
