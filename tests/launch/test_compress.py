"""The retraining loop of launch/compress.py, on random images."""

from pathlib import Path

import torch

from launch.compress import Recipe, compress_model
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
