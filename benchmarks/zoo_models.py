"""Small models that zoo.py adds to those of models.py: vision, sound and text as people write them
in plain PyTorch.
"""

from __future__ import annotations

import models
import torch
from torch import Tensor, nn

from quantize import ConvNet, ConvNetConfig


def stages(*widths: int, convolutions: int) -> list[nn.Module]:
    """Convolutions of colour images with BatchNorm, so many for each width, and then a pool."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in widths:
        for channels in (inputs, *[outputs] * (convolutions - 1)):
            conv = nn.Conv2d(channels, outputs, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
        inputs = outputs
    return layers


def vgg() -> nn.Module:
    """For images of 64 pixels a side."""
    convs = stages(64, 128, 256, convolutions=2)
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(256 * 64, 256), nn.Linear(256, 10))


class UNet(nn.Module):
    """Two levels down and up, with a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.double(3, 64), self.double(64, 128)
        self.middle = self.double(128, 256)
        self.up2 = nn.ConvTranspose2d(256, 128, 2, 2)
        self.up1 = nn.ConvTranspose2d(128, 64, 2, 2)
        self.merge2, self.merge1 = self.double(256, 128), self.double(128, 64)
        self.head, self.pool = nn.Conv2d(64, 1, 1), nn.MaxPool2d(2)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        first, second = (nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        x = self.up2(self.middle(self.pool(second)))
        x = self.up1(self.merge2(torch.cat([x, second], 1)))
        return self.head(self.merge1(torch.cat([x, first], 1)))


class TextCnn(nn.Module):
    """Convolutions of three widths over embeddings (Kim, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(models.VOCABULARY, 256)
        self.convs = nn.ModuleList(nn.Conv1d(256, 128, kernel) for kernel in (3, 4, 5))
        self.head = nn.Linear(384, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).transpose(1, 2)
        return self.head(torch.cat([conv(x).relu().amax(-1) for conv in self.convs], 1))


class Crnn(nn.Module):
    """Convolutions, then a bidirectional LSTM along the width: reads lines of text."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(*stages(64, 128, 256, convolutions=1))
        self.lstm = nn.LSTM(2048, 256, bidirectional=True, batch_first=True)
        self.head = nn.Linear(512, 80)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.lstm(x)[0])


class SpeakerEncoder(nn.Module):
    """Three LSTM layers and a projection, over 40 mel channels (Wan et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.head = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(self.lstm(x)[1][0][-1]).relu(), dim=1)


class Tagger(nn.Module):
    """A bidirectional LSTM over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30000, 128)
        self.lstm = nn.LSTM(128, 256, bidirectional=True, batch_first=True)
        self.head = nn.Linear(512, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0])


def mlp() -> nn.Module:
    """Three linear layers."""
    first, second, last = nn.Linear(512, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 10)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def digits() -> nn.Module:
    """What `train.py --task image` trains."""
    return ConvNet(ConvNetConfig(widths=(64, 128), blocks=2))
