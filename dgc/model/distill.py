"""Soft targets from a larger model, as a loss for retraining a compressed one.

Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531.
"""

from torch import Tensor
from torch.nn import functional as F

from dgc.errors import ConfigError


def distill(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, weight: float
) -> Tensor:
    """weight·T²·KL(softmax(teacher / T) ‖ softmax(logits / T)) + (1 − weight)·cross entropy.

    T² keeps the size of the soft gradient independent of T (section 2 of the paper).

    Args:
        logits: floating point `[n, classes]`, of the model in training.
        teacher_logits: the same shape; no gradient flows into them.
        labels: int64 `[n]`.
        temperature: T > 0; 2 to 5 as a rule.
        weight: of the soft targets, in [0, 1].

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ConfigError: if temperature or weight is out of range.

    Example:
        >>> import torch
        >>> same = torch.tensor([[2.0, 0.0]])
        >>> float(distill(same, same, torch.tensor([0]), temperature=2.0, weight=1.0))
        0.0
    """
    if temperature <= 0 or not 0 <= weight <= 1:
        raise ConfigError(f"temperature {temperature}, weight {weight}: give > 0 and in [0, 1]")
    soft = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(logits, labels)
    return weight * temperature**2 * soft + (1 - weight) * hard
