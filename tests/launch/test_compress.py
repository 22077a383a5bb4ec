"""The retraining loop of launch/compress.py, on random images."""

import math
from pathlib import Path

import pytest
import torch

from launch.compress import Recipe, compress_model, sgd, train
from launch.fashion_mnist import Data
from launch.models import build


def random_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(512, 1, 28, 28, generator=generator)
    labels = (images[:, 0, 0, :10] + images[:, 0, 5, :10]).argmax(1)
    return Data(images, labels, images[:200], labels[:200])


def test_training_with_dropout_repeats_and_leaves_none_behind(tmp_path: Path) -> None:
    found = {}
    for name, dropout in (("none", 0.0), ("first", 0.3), ("again", 0.3)):
        model = build("lenet300", seed=1)
        recipe = Recipe(prune_epochs=2.0, dropout=dropout)
        compress_model(model, random_data(), tmp_path / name, recipe, log=lambda line: None)
        found[name] = (tmp_path / name).read_bytes()
        images = random_data().test_images
        assert torch.equal(model.train()(images), model(images))
    assert found["first"] == found["again"]
    assert found["first"] != found["none"]


def test_the_rate_rises_and_falls_along_a_cosine() -> None:
    model, seen = build("lenet300", seed=1), []
    optimizer = sgd(model, 0.1)
    train(
        model,
        random_data(),
        optimizer,
        epochs=5,
        warmup=0.25,
        each_step=lambda step, steps: seen.append(optimizer.param_groups[0]["lr"]),
    )
    expected = [
        0.1 * min(1, (1 + step * 4 / 5) / 5) * (1 + math.cos(math.pi * step / 20)) / 2
        for step in range(20)
    ]
    assert seen == pytest.approx(expected)


def test_structure_gathers_weights_and_units_without_inputs_go(tmp_path: Path) -> None:
    empty = {}
    for structure in (0.0, 1.0):
        model = build("lenet300", seed=1)
        recipe = Recipe(density=0.05, prune_epochs=1.0, structure=structure)
        compress_model(model, random_data(), tmp_path / "m", recipe, log=lambda line: None)
        empty[structure] = int((model.get_parameter("1.weight").abs().sum(0) == 0).sum())
    assert empty[1.0] > empty[0.0]
    unfed = ~model[1].weight.any(1)
    assert 0 < int(unfed.sum()) < 300
    assert not model[1].bias[unfed].any()
    assert not model[3].weight[:, unfed].any()
