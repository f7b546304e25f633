"""Image classifiers: a residual ConvNet and a multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize import checkpoint
from quantize.models.config import ConvNetConfig, MLPConfig


class ConvBlock(nn.Module):
    """Two 3x3 conv-BatchNorm pairs around a shortcut (He et al., arXiv 1512.03385); [N, C, H, W] in
    and out.
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


@checkpoint.architecture
class ConvNet(nn.Module):
    """Residual image classifier: images [N, C, H, W] -> logits [N, classes]; any H and W."""

    config_class = ConvNetConfig

    def __init__(self, config: ConvNetConfig):
        super().__init__()
        self.config = config
        first = config.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_channels, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        )
        blocks, channels = [], first
        for stage, width in enumerate(config.widths):
            for block in range(config.blocks):
                blocks.append(
                    ConvBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1)
                )
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, config.classes)

    def example_inputs(self, batch: int = 1) -> Tensor:
        """Random images [batch, C, 28, 28], always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, self.config.in_channels, 28, 28, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


@checkpoint.architecture
class MLP(nn.Module):
    """Multilayer perceptron: inputs [N, ...] flattened to [N, in_features] -> logits [N,
    classes].
    """

    config_class = MLPConfig

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        widths = (config.in_features, *config.hidden)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], config.classes)

    def example_inputs(self, batch: int = 1) -> Tensor:
        """Random vectors [batch, in_features], always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, self.config.in_features, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.flatten(1)))
