"""The network whose files the tests write."""

import torch
from torch import Tensor, nn

CODERS = ["ans", "huffman"]


class Net(nn.Module):
    """Convolution, norm with buffers, tied weights, half precision: what a file must carry."""

    def __init__(self, hidden: int = 40) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 16, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.tied = nn.Linear(hidden, hidden, bias=False)
        self.tied.weight = self.fc2.weight
        self.out = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.out(self.tied(self.fc2(self.fc1(x).relu()).relu()))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()
