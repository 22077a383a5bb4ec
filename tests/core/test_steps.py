"""The kernels over an optimizer's state: the reference's bits, and the reference's own formulas."""

import math

import pytest
import torch
from torch import Tensor

from dgc.core import kernels
from dgc.core.kernels import reference
from tests.core.implementations import Implementation

NUMELS = (1, 3, 1024, 0, 2049, 40_001)


def random(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in NUMELS]


def gradients(seed: int) -> list[Tensor]:
    """Some elements are zero."""
    return [torch.where(g.abs() < 0.5, 0.0, g) for g in random(seed)]


ADAM = torch.tensor([[1.0, 0.999, 0.001, 1e-8], [-0.37, 0.9, 0.1, 0.0]]).repeat(3, 1)
SCALES = torch.tensor([31.6, 1.0, 2.5, 1.0, 1.0, 3.1])
DECAY = torch.tensor([[0.1, 0.9, 1, 0, 1, 0.75], [0.3, 0.8, 0.7, 1, -1, 1]]).repeat(3, 1)


def adam(implementation: Implementation, bad: float | None = None) -> tuple[bool, list[Tensor]]:
    grads, seconds = gradients(1), [s.abs() for s in random(2)]
    if bad is not None:
        grads[2][77] = bad
    grads, seconds = ([implementation.to(t) for t in each] for each in (grads, seconds))
    scales = implementation.to(SCALES)
    finite = implementation.module.precondition_(grads, seconds, scales, ADAM)
    return bool(finite), [t.cpu() for t in (*grads, *seconds)]


def decayed(implementation: Implementation) -> list[Tensor]:
    states = [[implementation.to(t) for t in own] for own in (gradients(1), random(2), random(3))]
    implementation.module.decay_(*states, DECAY)
    return [t.cpu() for own in states for t in own]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.view(torch.int32), two.view(torch.int32))


def test_second_moments_equal_the_reference_to_the_bit(implementation: Implementation) -> None:
    finite, expected = adam(Implementation(reference, "cpu"))
    found_finite, found = adam(implementation)
    assert finite
    assert found_finite
    same_bits(found, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # Triton's interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20, -1e20])
def test_a_square_that_is_not_finite_enters_nothing(
    bad: float, implementation: Implementation
) -> None:
    for each in (implementation, Implementation(reference, "cpu")):
        finite, found = adam(each, bad)
        assert not finite
        assert all(grad.isnan().all() for grad in found[: len(NUMELS)])
        same_bits(found[len(NUMELS) :], [s.abs() for s in random(2)])


def test_the_momentum_of_decay_equals_the_reference_to_the_bit(
    implementation: Implementation,
) -> None:
    same_bits(decayed(implementation), decayed(Implementation(reference, "cpu")))


def test_second_moments_follow_the_formula() -> None:
    grads, seconds = gradients(1), [s.abs() for s in random(2)]
    wanted = []
    for g, s, scale, row in zip(grads, seconds, SCALES.tolist(), ADAM.tolist(), strict=True):
        gain, kept, share, eps = row
        entering = g.double() * gain
        moment = kept * s.double() + share * entering.square()
        wanted.append((entering / (moment.sqrt() * scale + eps), moment))
    assert reference.precondition_(grads, seconds, SCALES, ADAM)
    for g, s, (step, moment) in zip(grads, seconds, wanted, strict=True):
        torch.testing.assert_close(g.double(), step, rtol=1e-6, atol=0)
        torch.testing.assert_close(s.double(), moment, rtol=1e-6, atol=0)


def test_decay_follows_the_optimizer() -> None:
    """SGD with weight decay and no gradient moves parameters by what `decay_` adds to zeros."""
    param = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(1)))
    sgd = torch.optim.SGD([param], lr=1.0, momentum=0.9, weight_decay=0.1, nesterov=True)
    buffer = torch.zeros(50)
    for _ in range(4):
        before, grad = param.detach().clone(), torch.zeros(50)
        param.grad = torch.zeros(50)
        sgd.step()
        kernels.decay_([grad], [before], [buffer], torch.tensor([[0.1, 0.9, 1, 1, 1, 0.75]]))
        torch.testing.assert_close(before - grad, param.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_of_any_layout_and_dtype(dtype: torch.dtype) -> None:
    """A tensor that the loops cannot read gives what it would give if they could."""
    grad, param, buffer = (
        t[:40_000].view(200, 200) for t in (each[-1] for each in map(random, range(3)))
    )
    outcomes = []
    for strided in (grad.t().contiguous().t(), grad.clone()):
        g, p, b = (t.to(dtype, copy=True) for t in (strided, param, buffer))
        kernels.decay_([g], [p], [b], DECAY[:1])
        outcomes.append((g.contiguous(), b))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
    torch.testing.assert_close(
        outcomes[0][0].float(), grad + 0.9 * buffer + 0.1 * param, rtol=2e-2, atol=5e-2
    )
