"""Networks and batches that the tests of distillation share."""

import copy

import torch
import torch.nn.functional as F
from helpers import run, zoo
from torch import nn

from quantize.compression.distillation import (
    soft_kl,
)


def net(width: int = 16, classes: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def inputs(count: int = 4, rows: int = 16, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 8, generator=generator) for _ in range(count)]


def labelled(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, x[:, :5].argmax(-1)) for x in inputs(count)]


def distance(student: nn.Module, teacher: nn.Module, batch: object) -> float:
    s, t = run(student, batch), run(teacher, batch)
    return soft_kl(s, t).item() if s.shape[-1] > 5 or s.ndim == 2 else F.mse_loss(s, t).item()


DEEP = {
    "bert": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "llama": {"num_hidden_layers": 4},
    "t5": {"num_layers": 4, "num_decoder_layers": 4},
    "vit": {"num_hidden_layers": 4},
    "resnet": {"depths": [1, 4]},
    "whisper": {"encoder_layers": 4, "decoder_layers": 4},
}


def deep(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of the zoo with stacks of four blocks; weights larger than at birth, so that answers
    differ.
    """
    model, example = zoo(name)
    config = copy.deepcopy(model.config)
    for key, value in DEEP[name].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = type(model)(type(config).from_dict(config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return model, example
