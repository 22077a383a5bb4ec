"""Rounding to bfloat16: to a neighbour, to the value in the mean, and the same bits for ever."""

import pytest
import torch
from torch import Tensor

from dgc.core.kernels import add_, seed_of
from dgc.core.kernels.rounding import U_BITS, V_BITS, mixed, rounded

HALVES = [U_BITS, V_BITS]


def stored(values: Tensor, seed: int, bits: int = V_BITS) -> Tensor:
    return rounded(values, torch.arange(values.numel()), torch.bfloat16, seed, bits).float()


def wide(seed: int, n: int) -> Tensor:
    """Normal values times powers of two from 2^-120 to 2^120."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-120, 121, (n,), generator=generator)
    return torch.ldexp(torch.randn(n, generator=generator), exponents)


@pytest.mark.parametrize("bits", HALVES)
def test_what_is_stored_is_a_neighbour(bits: int) -> None:
    values = wide(0, 100_000)
    found = stored(values, seed_of(1), bits)
    below = (values.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    above = (below.view(torch.int32) + 0x10000).view(torch.float32)
    assert bool(((found == below) | (found == above)).all())
    assert bool(((found - values).abs() < 2**-7 * values.abs()).all())


@pytest.mark.parametrize("bits", HALVES)
def test_what_bfloat16_holds_is_not_changed(bits: int) -> None:
    values = torch.cat([wide(0, 1000).bfloat16().float(), torch.tensor([0.0, -0.0])])
    for step in range(20):
        found = stored(values, seed_of(step), bits)
        assert torch.equal(found.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("bits", HALVES)
@pytest.mark.parametrize("share", [1 / 65536, 0.01, 0.25, 0.5, 0.9, 65535 / 65536])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mean_is_the_value(share: float, sign: float, bits: int) -> None:
    """Over places, and at one place over seeds: within 5 standard errors."""
    n = 1 << 18
    r = round(share * 65536) / 65536
    value = torch.tensor(sign * (1 + r * 2**-7))
    places = (stored(value.expand(n).contiguous(), seed_of(3), bits) - sign) * sign * 2**7
    seeds = torch.tensor([seed_of(0, step, 1) for step in range(1 << 14)])
    draws = mixed(77 ^ seeds) >> bits & 0xFFFF
    over_seeds = (draws + round(r * 65536) >= 65536).double()
    for ups in (places.double(), over_seeds):
        assert abs(ups.mean().item() - r) <= 5 * (r * (1 - r) / ups.numel()) ** 0.5


def test_u_and_v_and_seeds_and_neighbours_are_rounded_independently() -> None:
    values = torch.full((1 << 16,), 1 + 2**-8)
    ups = [
        stored(values, seed, bits) > 1 for seed in (seed_of(0, 1), seed_of(0, 2)) for bits in HALVES
    ]
    ups.append(ups[0].roll(1))
    table = torch.corrcoef(torch.stack(ups).double()) - torch.eye(5)
    assert table.abs().max() <= 5 / 2**8


def test_the_bits_are_fixed() -> None:
    """A checkpoint must go on as it would have, with every later version."""
    assert mixed(torch.arange(4)).tolist() == [0, 1753845952, 3507691905, 1408362973]
    assert seed_of(1, 2, 3) == 1066372762
    found = stored(torch.full((16,), 1 + 2**-8), seed_of(1, 2, 3))
    assert (found > 1).int().tolist() == [1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]


def test_add_rounds_only_bfloat16() -> None:
    places, values = torch.tensor([2, 0]), torch.tensor([2**-9, 1.0])
    exact, halves = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    add_(exact, places, values, 5)
    assert exact.tolist() == [2.0, 1.0, 1 + 2**-9]
    ends = set()
    for step in range(50):
        halves.fill_(1)
        add_(halves, places, values, seed_of(step))
        ends.add(tuple(halves.tolist()))
    assert ends == {(2.0, 1.0, 1.0), (2.0, 1.0, 1 + 2**-7)}
