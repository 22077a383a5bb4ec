"""The networks of the reference job, for images of 1 x 28 x 28 and 10 classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def lenet5() -> nn.Module:
    """LeNet-5 as in Caffe and the Deep Compression paper: 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def lenet300() -> nn.Module:
    """LeNet-300-100: 266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside an identity that is padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        skip = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(skip, (0, 0, 0, 0, 0, self.extra)))


def resnet20() -> nn.Module:
    """ResNet-20 of the CIFAR-10 experiments (He et al., 2016), on one channel."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    channels = 16
    for width in (16, 32, 64):
        for block in range(3):
            layers.append(_Residual(channels, width, 2 if width > 16 and block == 0 else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MODELS = {"lenet5": lenet5, "lenet300": lenet300, "resnet20": resnet20}


def build(name: str, seed: int = 0) -> nn.Module:
    """The network `name`, its parameters drawn with `seed`."""
    torch.manual_seed(seed)
    return MODELS[name]()
