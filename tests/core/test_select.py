"""What selectors promise: never more than asked, the largest, evenly, the same for the same state."""

import pytest
import torch
from torch import Tensor

from benchmarks.quality import run
from dgc.core import kernels, num_selected, select_topk
from dgc.core.layout import Layout
from dgc.core.select import ChunkedTopK, ExactTopK, Selector, ThresholdTopK, topk_mask
from dgc.errors import ConfigError

SELECTORS = [ExactTopK(), ThresholdTopK(), ChunkedTopK(), ChunkedTopK(chunk=7)]
NUMELS = (1, 10, 4096, 5000, 33_333)


def gaussian(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("numel", "density", "expected"),
    [(5000, 0.001, 5), (5001, 0.001, 6), (1, 0.001, 1), (7, 1.0, 7), (3, 0.34, 2), (25, 0.04, 1)],
)
def test_number_selected(numel: int, density: float, expected: int) -> None:
    assert num_selected(numel, density) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_topk_takes_exactly_k_and_the_first_of_equals(dtype: torch.dtype) -> None:
    values = torch.tensor([[2, -3, 0, 3], [-2, 2, 0, 0]], dtype=dtype)
    for k, indices in [(1, [1]), (3, [0, 1, 3]), (6, [0, 1, 2, 3, 4, 5]), (8, list(range(8)))]:
        sparse = select_topk(values, k)
        assert sparse.indices.tolist() == indices
        assert torch.equal(sparse.values, values.flatten()[indices])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_topk_as_a_mask(dtype: torch.dtype) -> None:
    """The same selection, ties included, also of a tensor that is not contiguous."""
    values = gaussian(120, seed=3).mul(4).round().view(2, 3, 4, 5).to(dtype)
    for tensor in (values, values.to(memory_format=torch.channels_last)):
        for k in (1, 7, 60, 119, 120):
            mask = topk_mask(tensor, k)
            assert mask.shape == tensor.shape
            assert torch.equal(mask.flatten().nonzero().squeeze(1), select_topk(tensor, k).indices)
    with pytest.raises(ConfigError, match="nan"):
        topk_mask(torch.tensor([1.0, float("nan"), 2.0]), 1)


@pytest.mark.parametrize("k", [0, 5])
def test_topk_refuses_a_count_out_of_range(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k is {k} for a tensor of 4 elements"):
        select_topk(torch.ones(4), k)


def test_topk_refuses_nan() -> None:
    with pytest.raises(ConfigError, match="1 elements are nan"):
        select_topk(torch.tensor([1.0, float("nan"), 2.0]), 2)


def test_chunks_must_hold_an_element() -> None:
    with pytest.raises(ConfigError, match="chunk is 0 elements"):
        ChunkedTopK(chunk=0)


def test_selectors_are_values() -> None:
    assert len({*SELECTORS, ChunkedTopK(), ThresholdTopK()}) == len(SELECTORS)


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("density", [0.001, 0.25, 1.0])
def test_selects_k_existing_elements_in_order(selector: Selector, density: float) -> None:
    layout = Layout.of(NUMELS)
    counts = [num_selected(numel, density) for numel in NUMELS]
    v = gaussian(layout.offsets[-1], 0)
    state = selector.state(layout)
    for _ in range(2):
        batch = selector.select_(v, layout, counts, state)
        assert batch.counts == tuple(counts)
        assert batch.numels == NUMELS
        for sparse, dense in zip(batch.split(), layout.split(v), strict=True):
            assert (sparse.indices.diff() > 0).all()
            assert torch.equal(dense[sparse.indices], sparse.values)


@pytest.mark.parametrize("selector", [ExactTopK(), ThresholdTopK()], ids=str)
def test_top_k_selectors_agree_with_torch(selector: Selector) -> None:
    layout = Layout.of(NUMELS)
    counts = [num_selected(numel, 0.01) for numel in NUMELS]
    v = gaussian(layout.offsets[-1], 1)
    batch = selector.select_(v, layout, counts, selector.state(layout))
    for sparse, dense, k in zip(batch.split(), layout.split(v), counts, strict=True):
        assert torch.equal(sparse.indices, torch.topk(dense.abs(), k).indices.sort().values)


def test_chunks_are_each_given_their_share() -> None:
    layout = Layout.of([1000, 10])
    batch = ChunkedTopK(chunk=100).select_(gaussian(1010, 2), layout, [25, 1], None)
    per_chunk = torch.bincount(batch.split()[0].indices // 100, minlength=10)
    assert per_chunk.tolist() == [2, 3] * 5
    assert batch.counts == (25, 1)
    v = layout.split(gaussian(1010, 2))[0]
    for chunk, count in enumerate(per_chunk.tolist()):
        run_of = v[100 * chunk : 100 * chunk + 100]
        best = torch.topk(run_of.abs(), count).indices.sort().values + 100 * chunk
        assert torch.isin(best, batch.split()[0].indices).all()


def test_chunks_with_empty_tensors() -> None:
    layout = Layout.of([0, 3, 0, 4, 0])
    v = torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
    batch = ChunkedTopK(chunk=2).select_(v, layout, [0, 1, 0, 2, 0], None)
    assert batch.counts == (0, 1, 0, 2, 0)
    assert batch.indices.tolist() == [2, 1, 3]


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(selector: Selector) -> None:
    layout = Layout.of([100])
    u, v, state = gaussian(100, 3), gaussian(100, 4), selector.state(layout)
    grad = torch.full((100,), float("nan"))
    finite, batch = selector.accumulate_select_([grad], u, v, layout, torch.ones(1, 4), [5], state)
    assert not finite
    assert batch.counts == (0,)
    assert torch.equal(u, gaussian(100, 3))
    assert torch.equal(v, gaussian(100, 4))


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_a_step_is_the_same_for_the_same_state(selector: Selector) -> None:
    layout = Layout.of([20_000])
    update = torch.tensor([[0.9, 1.0, 0.1, 0.0]])
    u, v, state = torch.zeros(20_000), torch.zeros(20_000), selector.state(layout)
    for step in range(5):
        copies = [None if t is None else t.clone() for t in (u, v, state)]
        batches = []
        for a, b, c in ((u, v, state), copies):
            assert b is not None
            _, batch = selector.accumulate_select_(
                [gaussian(20_000, step)], a, b, layout, update, [20], c
            )
            kernels.release_(a, b, layout, batch, batch.values, masking=True)
            batches.append(batch)
        assert torch.equal(batches[0].indices, batches[1].indices)
        assert torch.equal(batches[0].values, batches[1].values)
        assert copies[1] is not None
        assert torch.equal(v, copies[1])
        assert state is None or torch.equal(state, copies[2])


@pytest.mark.parametrize("selector", [ExactTopK(), ThresholdTopK()], ids=str)
def test_quality_over_200_steps_of_a_drifting_heavy_tailed_gradient(selector: Selector) -> None:
    found = run(selector, numel=50_000, steps=200)
    assert sum(found.recall) / len(found.recall) >= 0.99
    assert min(found.recall) >= 0.95
    assert found.most <= 1.0
    assert min(found.shares) >= 0.97
    assert max(found.shares) <= 1.03
