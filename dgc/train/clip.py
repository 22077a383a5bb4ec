"""Local gradient clipping (paper, section 3.3)."""


def local_clip_scale(squared_norm: float, clip_norm: float, world_size: int) -> float:
    """min(1, clip_norm · N^-1/2 / |g|): the factor that one of N ranks applies to its gradient.

    N independent gradients of norm c·N^-1/2 add up to one of norm c.

    Args:
        squared_norm: |g|², all parameters of this rank together, finite.
        clip_norm: threshold for the norm of the sum, positive.
        world_size: N.

    Example:
        >>> local_clip_scale(100.0, 10.0, 4)
        0.5
    """
    threshold = clip_norm * world_size**-0.5
    norm: float = squared_norm**0.5
    return min(1.0, threshold / norm) if norm > 0 else 1.0
