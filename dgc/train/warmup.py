"""Density warm-up (paper, section 3.3): exponential, a factor of 4 a stage."""

import math

from dgc.config import DGC

FACTOR = 4


def density_at(step: int, config: DGC) -> float:
    """The density of training step `step`, counted from 0.

    `warmup_steps` are divided evenly among the stages warmup_density · 4^-j that lie above
    `density`.

    Example:
        >>> config = DGC(density=0.001, warmup_steps=4)
        >>> [density_at(step, config) for step in range(6)]
        [0.25, 0.0625, 0.015625, 0.00390625, 0.001, 0.001]
    """
    if step >= config.warmup_steps or config.warmup_density <= config.density:
        return config.density
    stages = math.ceil(math.log(config.warmup_density / config.density, FACTOR) - 1e-9)
    return config.warmup_density * float(FACTOR) ** -(step * stages // config.warmup_steps)
