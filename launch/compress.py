"""Compress a trained image classifier: prune, retrain, share, retrain, save; a table of stages.

from launch.compress import compress_model
compress_model(model, data, "model.dgc")
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

import dgc.model
from dgc.model import report
from launch.fashion_mnist import Data

BATCH = 128
MASK_EVERY = 50  # steps between two lowerings of the density


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is compressed."""

    density: float | Mapping[str, float] = 0.08
    """Share of weights kept, for all layers or by name."""
    structure: float | Mapping[str, float] = 0.0
    """How far rows and columns that hold much keep more, for all layers or by name."""
    bits: int | Mapping[str, int] = 5
    """Width of the codes of shared weights."""
    penalty: float = 0.0
    """λ of the entropy-penalised codes."""
    prune_epochs: float = 2.0
    """Epochs of training while the density falls and, for the last third, stays."""
    share_epochs: float = 0.5
    """Epochs in which the shared values train."""
    optimizer: str = "adam"
    """While pruning: `"adam"`, or `"sgd"` with Nesterov momentum of 0.9."""
    lr: float = 1e-3
    """Its step; it decays to zero along a cosine."""
    warmup: float = 0.0
    """Share of the steps of pruning in which it rises to that."""
    weight_decay: float = 0.0
    """Weights that are not needed shrink before it is chosen which to keep."""
    share_lr: float = 2e-4
    """Adam's step for the shared values."""
    distill_weight: float = 0.0
    """Weight of the teacher's soft targets."""
    temperature: float = 3.0
    """Of those soft targets."""
    dropout: float = 0.0
    """Share of the inputs of the first linear layer that is dropped while pruning."""
    batch: int = BATCH
    """Images a step."""
    bf16: bool = False
    """Train in bfloat16 by autocast."""
    coder: str = "ans"
    """`"ans"` or `"huffman"`."""
    half: bool = False
    """Biases and codebooks in 16 bits."""


@dataclass(frozen=True)
class Stage:
    """A row of the table: accuracy in percent of the test images, bytes of a file."""

    name: str
    accuracy: float
    file_bytes: int


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of `images` that `model` labels rightly."""
    model.eval()
    with torch.no_grad():
        parts = zip(images.split(1000), labels.split(1000), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(labels)


def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: float,
    seed: int = 0,
    batch: int = BATCH,
    bf16: bool = False,
    teacher: Tensor | None = None,
    distill_weight: float = 0.0,
    temperature: float = 3.0,
    dropout: float = 0.0,
    warmup: float = 0.0,
    each_step: Callable[[int, int], None] = lambda step, steps: None,
    progress: str = "",
) -> None:
    """`optimizer` with a cosine schedule over `data`; `each_step(step, steps)` comes first.

    With `bf16` autocast computes in bfloat16. `teacher` are another model's logits on the training
    images; `dropout` is the share of the inputs of the first linear layer that is dropped, `warmup`
    that of the steps in which the learning rate rises to where the cosine begins;
    `progress`, where given, is the name of a progress bar.
    """
    from tqdm import tqdm

    steps = max(1, round(epochs * math.ceil(len(data.train_labels) / batch)))
    schedules: list[LRScheduler] = [CosineAnnealingLR(optimizer, steps)]
    if rising := round(warmup * steps):
        schedules.append(LinearLR(optimizer, 1 / rising, total_iters=rising))
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    noise = torch.Generator().manual_seed(seed)

    def drop(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        kept = torch.rand(inputs[0].shape, generator=noise) >= dropout
        return inputs[0] * kept / (1 - dropout)

    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hook = linear[0].register_forward_pre_hook(drop) if dropout else None
    model.train()
    for step in tqdm(range(steps), progress, unit="step", mininterval=1, disable=not progress):
        each_step(step, steps)
        if not batches:
            order = torch.randperm(len(data.train_labels), generator=generator)
            batches = list(order.split(batch))
        rows = batches.pop()
        labels = data.train_labels[rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(data.train_images[rows]).float()
        if teacher is None or not distill_weight:
            loss = F.cross_entropy(logits, labels)
        else:
            loss = dgc.model.distill(
                logits, teacher[rows], labels, temperature=temperature, weight=distill_weight
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    if hook:
        hook.remove()


def adam(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)


def sgd(model: nn.Module, lr: float, weight_decay: float = 5e-4) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


OPTIMIZERS = {"adam": adam, "sgd": sgd}


def compress_model(
    model: nn.Module,
    data: Data,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    teacher: Tensor | None = None,
    log: Callable[[str], None] = print,
) -> tuple[list[Stage], report.Report]:
    """Prune, retrain, share, retrain and save `model`, which is changed; log a table.

    Args:
        model: a trained classifier of `data`'s images.
        out: the file to write.
        recipe: by default 8 % of the weights, 5 bits.
        teacher: logits on the training images; by default `model`'s own, as it is trained.
        log: called with each line of the table.

    Returns:
        The stages, and the report of the saved file.
    """
    recipe = recipe or Recipe()
    test = (data.test_images, data.test_labels)
    stages: list[Stage] = []

    def stage(name: str, file_bytes: int) -> None:
        stages.append(Stage(name, accuracy(model, *test), file_bytes))
        log(f"{name:<28} accuracy {stages[-1].accuracy:6.2f} %  {file_bytes:>10,} bytes")

    if teacher is None and recipe.distill_weight:
        teacher = logits_of(model, data.train_images)
    dense = sum(t.numel() * t.itemsize for t in dgc.model.plain_state(model).values())
    stage("trained", dense)
    shared = ("batch", "bf16", "distill_weight", "temperature")
    extra = {name: getattr(recipe, name) for name in shared} | {"seed": seed, "teacher": teacher}
    _prune_and_train(model, data, recipe, progress="prune", **extra)
    stage("pruned, retrained", _size(model, out, recipe))
    dgc.model.share(model, _plain(recipe.bits), penalty=recipe.penalty)
    stage("shared", _size(model, out, recipe))
    # Gradients of shared values are sums over their members, of any size: Adam does not mind.
    optimizer = adam(model, recipe.share_lr)
    train(model, data, optimizer, epochs=recipe.share_epochs, progress="share", **extra)
    saved = dgc.model.save(model, out, coder=recipe.coder, half=recipe.half)
    stage("shared, retrained, saved", saved.file_bytes)
    return stages, saved


def _prune_and_train(model: nn.Module, data: Data, recipe: Recipe, **extra: object) -> None:
    """Lower the density along the cubic schedule for two thirds of the steps; fold what it cuts off."""
    target = _plain(recipe.density)
    names = (
        target if isinstance(target, dict) else dict.fromkeys(dgc.model.weights_of(model), target)
    )

    def lower(step: int, steps: int) -> None:
        end = min(max(1, 2 * steps // 3), steps - 1)
        if step == end or (step < end and step % MASK_EVERY == 0):
            now = {
                name: final if step == end else dgc.model.cubic_density(step, 0, end, final=final)
                for name, final in names.items()
            }
            dgc.model.fold(dgc.model.prune(model, now, structure=_plain(recipe.structure)))

    optimizer = OPTIMIZERS[recipe.optimizer](model, recipe.lr, recipe.weight_decay)
    options = {name: getattr(recipe, name) for name in ("dropout", "warmup")}
    options |= {"epochs": recipe.prune_epochs, **extra}
    train(model, data, optimizer, each_step=lower, **options)


def _plain(setting):
    return dict(setting) if isinstance(setting, Mapping) else setting


def _size(model: nn.Module, out: str | Path, recipe: Recipe) -> int:
    """Bytes of the file as the model stands, written where the final one will lie."""
    return dgc.model.save(model, out, coder=recipe.coder, half=recipe.half).file_bytes


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """`model`'s outputs for all `images`, a thousand at a time."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(1000)])
