"""Int8Embedding and Int8EmbeddingBag: embedding tables whose rows are int8."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.nn import dtype_name, dtype_named
from quantize.nn import int8_kernels as kernels
from quantize.nn.protocol import Int8Layer, empty


@surgery.builder
class Int8Embedding(Int8Layer):
    """Look-up in a table of int8 rows: ids `[...]` to vectors `[..., embedding_dim]` in the dtype
    that the table had.

    `packed` int8 `[num_embeddings, embedding_dim]`, `scale` float32 `[num_embeddings]`.
    Both can be shared with an `Int8Linear`: a tied head.
    """

    padding_idx: int | None

    def __init__(self, packed: Tensor, scale: Tensor, *, dtype: torch.dtype) -> None:
        super().__init__(dtype, packed=packed, scale=scale)
        self.num_embeddings, self.embedding_dim = packed.shape

    @classmethod
    def from_layer(cls, layer: Any) -> Self:
        """Quantize a float table."""
        dtype = layer.weight.dtype
        new = cls(*kernels.quantize_weight(layer.weight), dtype=dtype).in_place_of(layer)
        surgery.record(
            new,
            cls.__name__,
            num_embeddings=new.num_embeddings,
            embedding_dim=new.embedding_dim,
            dtype=dtype_name(dtype),
        )
        return new

    @classmethod
    def rebuild(
        cls, module: nn.Module, num_embeddings: int, embedding_dim: int, dtype: str = "float32"
    ) -> Self:
        """An empty table (on the meta device) in place of `module`, for a file's tensors."""
        packed = empty(torch.int8, num_embeddings, embedding_dim)
        scale = empty(torch.float32, num_embeddings)
        return cls(packed, scale, dtype=dtype_named(dtype)).in_place_of(module)

    def in_place_of(self, module: nn.Module) -> Self:
        """This table, with what it has of the module that it replaces; `padding_idx` is only for
        those who ask for it.
        """
        self.padding_idx = getattr(module, "padding_idx", None)
        return self.train(module.training)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows = (self.num_embeddings,)
        return {"packed": (*rows, self.embedding_dim), "scale": rows}

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.packed) * F.embedding(input, self.scale.unsqueeze(-1))
        return rows.to(self.like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


@surgery.builder
class Int8EmbeddingBag(Int8Embedding):
    """`nn.EmbeddingBag` with int8 rows, for inference: ids and offsets to the sum, mean or maximum
    of the vectors of each bag, in the dtype that the table had.

    Only the rows that a call asks for become float.

    Source: `torch.nn.EmbeddingBag`.
    """

    mode: str = "mean"
    include_last_offset: bool = False

    def in_place_of(self, module: nn.Module) -> Self:
        """This table, with what it has of the module that it replaces."""
        self.mode = getattr(module, "mode", "mean")
        self.include_last_offset = getattr(module, "include_last_offset", False)
        return super().in_place_of(module)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        rows = super().forward(input.flatten())
        places = torch.arange(input.numel(), device=input.device, dtype=input.dtype)
        padding = None
        if self.padding_idx is not None or not len(rows):
            # One more row stands for the padding: F.embedding_bag leaves out one id.
            rows = torch.cat([rows, rows.new_zeros(1, self.embedding_dim)])
        if self.padding_idx is not None:
            padding = input.numel()
            places = places.where(input.flatten() != self.padding_idx, padding)
        return F.embedding_bag(
            places.reshape(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
