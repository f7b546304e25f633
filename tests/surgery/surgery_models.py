"""A net and builders that the tests of surgery share."""

from __future__ import annotations

from torch import nn

from quantize import surgery


class Net(nn.Module):
    """A bit of everything: a tie, a module in two places, a frozen parameter, a hook, modules in
    training and in eval mode.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.again = self.body[2]
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.sizes, self.kind, self.flag, self.limit = [1, 2], "plain", True, None

    def forward(self, ids):
        return self.head(self.norm(self.again(self.body[:2](self.embed(ids)))))


class Scaled(nn.Linear):
    """A replacement that the record can name."""

    def __init__(self, old: nn.Linear, factor: float):
        super().__init__(old.in_features, old.out_features, device="meta")
        self.weight, self.bias, self.factor = old.weight, old.bias, factor

    def forward(self, x):
        return super().forward(x) * self.factor


@surgery.builder
def scaled_for_test(module: nn.Module, factor: float) -> nn.Module:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"not a linear: {type(module).__name__}")
    return Scaled(module, factor)


def scale(model: nn.Module, names: list[str], factor: float) -> nn.Module:
    replacements = {}
    for name in names:
        new = Scaled(model.get_submodule(name), factor)
        surgery.record(new, "scaled_for_test", factor=factor)
        replacements[model.get_submodule(name)] = new
    return surgery.replace(model, replacements)
