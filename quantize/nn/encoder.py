"""PaddedEncoder: torch's `nn.TransformerEncoder` without the paths on which it reads float weights.

In eval mode and without gradients, torch's encoder leaves out the positions that a padding mask
marks, if they stand at the end of each row, and gives zeros there. A mean over all positions, say,
depends on it. Elsewhere those positions are computed like all others.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from quantize import surgery
from quantize.nn.protocol import standing_for


class PaddedEncoder(nn.TransformerEncoder):
    """Computes all positions, and gives zeros where torch's encoder does.

    Left out: finite numbers in a mask, which torch's encoder takes for padding then.
    """

    own_class: type[nn.Module] = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        pads = src_key_padding_mask
        if pads is None or mask is not None or src.dim() != 3 or self._computes_all():
            return super().forward(src, mask, pads, is_causal)
        output = src
        for layer in self.layers:
            output = layer(output, src_key_padding_mask=pads)
        output = output.masked_fill(self._left_out(pads).unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _computes_all(self) -> bool:
        """Does torch's encoder compute padding, too?"""
        first = self.layers[0]
        if first.training:
            return True
        return torch.is_grad_enabled() and any(one.requires_grad for one in first.parameters())

    def _left_out(self, pads: Tensor) -> Tensor:
        """Of a padding mask, what stands at the end of each row; nothing where a row has some
        elsewhere.
        """
        marked = pads if pads.dtype is torch.bool else pads != 0
        if not self.mask_check:
            return marked
        return marked & (marked[:, 1:] >= marked[:, :-1]).all()


@functools.cache
def _padded_class(base: Any) -> Any:
    """The subclass of a class of encoders for which its `super().forward` is PaddedEncoder's."""
    if base is nn.TransformerEncoder:
        return PaddedEncoder
    return standing_for(base, (base, PaddedEncoder), {}, _padded_class)


@surgery.builder
def padded_encoder(module: nn.Module) -> nn.Module:
    """Make one of torch's encoders a `PaddedEncoder`, in place."""
    if isinstance(module, nn.TransformerEncoder) and not isinstance(module, PaddedEncoder):
        module.__class__ = _padded_class(type(module))
    return module


def with_padded_encoders(model: nn.Module) -> nn.Module:
    """Make those of torch's encoders PaddedEncoders, in place, that leave out padding."""
    for module in model.modules():
        leaves_out = getattr(module, "use_nested_tensor", False)
        leaves_out = leaves_out and not isinstance(module, PaddedEncoder)
        if leaves_out and isinstance(module, nn.TransformerEncoder):
            surgery.record(padded_encoder(module), "padded_encoder")
    return model


def without_fast_paths(model: nn.Module) -> None:
    """Turn off, in place, what reads float weights in torch's encoder layers: the flags that they
    look at first.
    """
    if torch.backends.mha.get_fastpath_enabled():
        with_padded_encoders(model)
    for module in model.modules():
        off: dict[str, Any] = {}
        if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
            off = {"activation_relu_or_gelu": 0}
        if isinstance(module, nn.TransformerEncoder) and getattr(
            module, "use_nested_tensor", False
        ):
            off = {"use_nested_tensor": False}
        if off:
            surgery.resize(module, tensors={}, attributes=off)
