"""A block of convolutions that several tests run in int8."""

from torch import Tensor, nn
from torch.nn import functional as F


class Mobile(nn.Module):
    """A depthwise convolution between others, and no activation behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 1)
        self.deep, self.cut = nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.cut(self.deep(F.relu6(self.wide(x))))
        return x + self.narrow(y)
