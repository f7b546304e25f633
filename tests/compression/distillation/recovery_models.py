"""A network and batches that the tests of recovery share."""

import torch
from torch import nn

from quantize import surgery


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    ).eval()


def data(count: int = 8, rows: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 8, generator=generator) for _ in range(count)]


def nearby(model: nn.Module, by: float = 0.3) -> nn.Module:
    """A copy with noise on its trainable parameters."""
    other, generator = surgery.clone(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += by * parameter.std(correction=0) * noise * parameter.requires_grad
    return other


def state(model: nn.Module) -> dict[str, object]:
    """All of a model that could change, as values."""
    plain = {}
    for prefix, module in model.named_modules():
        public = {name: value for name, value in vars(module).items() if name[0] != "_"}
        plain |= {f"{prefix}.{name}": repr(value) for name, value in public.items()}
    return plain | {
        name: tensor.detach().clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    equal = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
    return a.keys() == b.keys() and all(equal)
