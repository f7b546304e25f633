"""The network that the tests of calibration look into, and gradients at its layers."""

from __future__ import annotations

import torch
from torch import nn

from quantize.calibration import call, watching, whole
from quantize.calibration.gradients import OutputGradients, without_weight_gradients


class TwoInputs(nn.Module):
    """Two layers on one input, one behind them, one that only runs when asked."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.c = nn.Linear(5, 3)
        self.rare = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, rare: bool = False) -> torch.Tensor:
        y = self.c(self.act(self.a(x) + self.b(x)))
        return y + self.rare(x) if rare else y


def gradient_moments(model, batches, layers, loss=None):
    """E[g g^T], [M, M], of the gradients g at each layer's outputs over all batches; loss: of an
    output, in place of the usual one.
    """
    gradients = OutputGradients(model, layers)
    if loss is not None:
        gradients._value = loss
    with watching(gradients.hooks(), model), without_weight_gradients(model), torch.enable_grad():
        for batch in batches:
            gradients.backward(call(model, batch))
    return {name: whole(moment()).float() for name, moment in gradients.result().items()}
