"""Small models that the tests of pruning share, with inputs for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from quantize import ConvNet, ConvNetConfig, DecoderConfig, DecoderLM


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def mlp(a: int = 8, b: int = 32, c: int = 24, d: int = 3) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d)
        )
    )


class Branches(nn.Module):
    """A model of parts: subclasses give the layers and the forward."""

    def __init__(self):
        super().__init__()
        self.build()


class Concat(Branches):
    def build(self):
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.out = nn.Conv2d(24, 5, 1)

    def forward(self, x):
        return self.out(torch.cat([self.a(x).relu(), self.b(x).sigmoid()], 1))


class Residual(Branches):
    def build(self):
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.prelu, self.head = nn.PReLU(16), nn.Linear(16 * 16, 4)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        x = self.prelu(x + self.bn1(self.conv(x)))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Depthwise(Branches):
    def build(self):
        self.expand, self.depth = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.grouped, self.norm = nn.Conv2d(32, 48, 3, groups=8), nn.GroupNorm(12, 48)
        self.squeeze, self.excite = nn.Linear(48, 8), nn.Linear(8, 48)
        self.out = nn.Conv2d(48, 5, 1)

    def forward(self, x):
        x = self.norm(self.grouped(self.depth(self.expand(x).relu()).relu())).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.out(x * gate[:, :, None, None])


class Shuffle(Branches):
    """ShuffleNet's channel split and shuffle, then pixel shuffle and a transposed convolution."""

    def build(self):
        self.stem, self.branch = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.up = nn.Conv2d(32, 64, 1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a, b = self.stem(x).relu().chunk(2, 1)
        x = torch.cat([a, self.branch(b).relu()], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(self.up(F.pixel_shuffle(self.wide(x), 2)).relu())


class Gated(Branches):
    """A fused gate-and-up projection, a scale per channel and a tied reader."""

    def build(self):
        self.both, self.down = nn.Linear(8, 64), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.down(F.gelu(a) * b * self.scale)


class Attention(Branches):
    """Fused QKV, matmul attention, and the number of heads written down in an attribute."""

    def build(self):
        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.proj = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(b, t, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        scores = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class Tied(Branches):
    """Input and output embedding share a weight; the residual stream has no norm, so it can
    shrink.
    """

    def build(self):
        self.embed, self.position = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.position
        return self.head(x + self.down(self.up(x).relu()))


class WrittenSize(Branches):
    """Has a size in its code: the first layer's channels can't go, the second's can."""

    def build(self):
        self.first, self.second, self.third = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.third(self.second(self.first(x).reshape(-1, 32)).relu())


class Padded(Branches):
    """Padding along two axes, of which one carries channels: of a linear's outputs, and of a
    convolution's.
    """

    def build(self):
        self.linear, self.conv = nn.Linear(8, 16), nn.Conv2d(3, 16, 3)
        self.read_linear, self.read_conv = nn.Linear(18, 4), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        wide = F.pad(self.linear(x), (1, 1, 1, 1))
        deep = F.pad(self.conv(x), (0, 0, 1, 1, 0, 8))
        return self.read_linear(wide).sum() + self.read_conv(deep)


class Blended(Branches):
    """A parameter meets channels and inputs in one operation: the channels stay, and the search for
    that ends.
    """

    def build(self):
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 4)
        self.shift = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.third(self.second(torch.addcmul(self.shift, self.first(x), x)).relu())


IMAGES = randn(2, 3, 8, 8)
SMALL = {
    "mlp": (mlp, randn(4, 8)),
    "concat": (Concat, IMAGES),
    "residual": (Residual, IMAGES),
    "depthwise": (Depthwise, IMAGES),
    "shuffle": (Shuffle, IMAGES),
    "gated": (Gated, randn(2, 5, 8)),
    "attention": (Attention, randn(2, 5, 16)),
    "tied": (Tied, torch.arange(12).view(2, 6)),
    "written_size": (WrittenSize, randn(4, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), randn(2, 5, 16)),
    "decoder": (
        lambda: DecoderLM(DecoderConfig(64, 32, 2, 4, 2, qkv_bias=True, qk_norm=True)),
        torch.arange(16).view(2, 8),
    ),
    "convnet": (lambda: ConvNet(ConvNetConfig(widths=(16, 32))), randn(2, 1, 8, 8)),
    "padded": (Padded, IMAGES),
    "blended": (Blended, randn(4, 8)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.GELU(), nn.Conv1d(16, 4, 3)),
        randn(2, 3, 9),
    ),
}


def small(name: str):
    build, inputs = SMALL[name]
    model = seeded(build)
    for p in model.parameters():  # layers that start as zeros would hide a wrong cut
        if not p.detach().any():
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(2))
    return model, inputs


def state(model: nn.Module):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    flags = [m.training for m in model.modules()]
    return [(n, t.detach().clone(), t.requires_grad) for n, t in tensors], flags


def untouched(model: nn.Module, before) -> bool:
    after = state(model)
    return after[1] == before[1] and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(after[0], before[0], strict=True)
    )


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


X = randn(4, 8)
