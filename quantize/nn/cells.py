"""ProjectedCell: what `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell` compute, with the products of
the input and of the state as layers of their own.

`projected` puts it in place. A loop calls it once a step, so no kernel can take all steps at once,
as in `int8_recurrent`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.nn.attention import fill

GATES: dict[type[nn.Module], int] = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
_PARTS = ("ih", "hh")


@surgery.builder
class ProjectedCell(nn.Module):
    """In place of a recurrent cell: same arguments, shapes and results; `ih` and `hh` are layers.

    Args:
        ih, hh: of the input and of the state, linear layers or what a technique put in their place;
            their outputs are the gates side by side, in torch's order.
        kind: `"LSTMCell"`, `"GRUCell"` or `"RNNCell"`.
        nonlinearity: of an RNNCell, `"tanh"` or `"relu"`.
    """

    ih: Any
    hh: Any

    def __init__(self, ih: nn.Module, hh: nn.Module, *, kind: str, nonlinearity: str) -> None:
        super().__init__()
        self.ih, self.hh, self.kind, self.nonlinearity = ih, hh, kind, nonlinearity

    @classmethod
    def from_module(cls, source: nn.RNNCellBase) -> ProjectedCell:
        """The same function, with copies of the weights of `source`."""
        kind = next(kind for kind in GATES if isinstance(source, kind)).__name__
        settings = {"kind": kind, "nonlinearity": getattr(source, "nonlinearity", "tanh")}
        new = cls.rebuild(source, **settings)
        for name in _PARTS:
            bias = getattr(source, f"bias_{name}")
            fill(getattr(new, name), getattr(source, f"weight_{name}"), bias)
        surgery.take_place(source, new)
        # the layers' own records follow it
        surgery.record(new, cls.__name__, **settings)
        return new

    @classmethod
    def rebuild(cls, module: nn.Module, kind: str, nonlinearity: str) -> ProjectedCell:
        """A frame in place of `module`, with empty layers; a file's tensors and the records of
        layers fill it.
        """
        if not isinstance(module, _named(kind)):
            raise ValueError(f"expected an nn.{kind}, found a {type(module).__name__}")
        weights: Any = [getattr(module, f"weight_{name}") for name in _PARTS]
        like = {"bias": module.bias_ih is not None, "device": "meta"}
        parts = [nn.Linear(*weight.shape[::-1], dtype=weight.dtype, **like) for weight in weights]
        return cls(*parts, kind=kind, nonlinearity=nonlinearity).train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        if self.nonlinearity not in ("tanh", "relu"):
            return f"its nonlinearity is {self.nonlinearity!r}"
        gates, width = (getattr(self.hh, f"{side}_features", None) for side in ("out", "in"))
        counts = [GATES[kind] * (width or 0) for kind in _named(self.kind)]
        return None if [gates] == counts else f"its hh makes {gates} gates of a state of {width}"

    @property
    def input_size(self) -> int:
        return self.ih.in_features

    @property
    def hidden_size(self) -> int:
        return self.hh.in_features

    @property
    def bias(self) -> bool:
        return self.ih.bias is not None

    @property
    def weight_ih(self) -> Tensor:
        return self.ih.weight

    @property
    def weight_hh(self) -> Tensor:
        return self.hh.weight

    @property
    def bias_ih(self) -> Tensor | None:
        return self.ih.bias

    @property
    def bias_hh(self) -> Tensor | None:
        return self.hh.bias

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the cell's: the next state, of an LSTMCell with its cells."""
        if input.dim() not in (1, 2):
            raise ValueError(f"the input must have 1 or 2 dimensions, got {list(input.shape)}")
        count = 2 if self.kind == "LSTMCell" else 1
        if hx is None:
            states = [input.new_zeros(*input.shape[:-1], self.hidden_size)] * count
        else:
            states = list(hx) if count == 2 else [hx]
        for state in states:
            if state.shape[:-1] != input.shape[:-1]:
                raise ValueError(
                    f"the input is {list(input.shape)}, but a state {list(state.shape)}"
                )
        x, h = self.ih(input), self.hh(states[0])
        if self.kind == "LSTMCell":
            i, f, g, o = (x + h).chunk(4, -1)
            cells = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
            return o.sigmoid() * cells.tanh(), cells
        if self.kind == "GRUCell":
            return _gru(x, h, states[0])
        return torch.tanh(x + h) if self.nonlinearity == "tanh" else F.relu(x + h)


def _named(name: Any) -> tuple[type[nn.Module], ...]:
    """The kind of cell of this name, or none."""
    return tuple(kind for kind in GATES if kind.__name__ == name)


def _gru(x: Tensor, h: Tensor, state: Tensor) -> Tensor:
    """The next state of a GRU, from the gates [..., 3 * width] of its input and of its state."""
    reset_x, update_x, new_x = x.chunk(3, -1)
    reset_h, update_h, new_h = h.chunk(3, -1)
    reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
    new = torch.tanh(new_x + reset * new_h)
    return new + update * (state - new)
