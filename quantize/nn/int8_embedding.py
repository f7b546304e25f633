"""Int8Embedding and Int8EmbeddingBag: embedding tables whose rows are int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantize import surgery
from quantize.nn import PackedLayer, dtype_name, dtype_named
from quantize.nn import int8_kernels as kernels


@surgery.builder
class Int8Embedding(PackedLayer):
    """Look-up in a table of int8 rows: ids `[...]` to vectors `[..., embedding_dim]` in the dtype
    that the table had.

    `packed` int8 `[num_embeddings, embedding_dim]`, `scale` float32 `[num_embeddings]`.
    Both can be shared with an `Int8Linear`: a tied head.
    """

    packed: Tensor
    scale: Tensor

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(dtype, "cpu" if packed.is_meta else packed.device)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @classmethod
    def from_weight(cls, weight: Tensor, padding_idx: int | None = None) -> Int8Embedding:
        """Quantize a float table `[num_embeddings, embedding_dim]`; `padding_idx` is only for those
        who ask for it.
        """
        new = cls(*kernels.quantize_weight(weight), dtype=weight.dtype, padding_idx=padding_idx)
        surgery.record(
            new,
            "Int8Embedding",
            num_embeddings=new.num_embeddings,
            embedding_dim=new.embedding_dim,
            dtype=dtype_name(weight.dtype),
        )
        return new

    @classmethod
    def rebuild(
        cls, module: nn.Module, num_embeddings: int, embedding_dim: int, dtype: str = "float32"
    ) -> Int8Embedding:
        """An empty table (on the meta device) in place of `module`, for a file's tensors."""
        new = cls(
            torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device="meta"),
            torch.empty(num_embeddings, dtype=torch.float32, device="meta"),
            dtype=dtype_named(dtype),
            padding_idx=getattr(module, "padding_idx", None),
        )
        return new.train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        shapes = {
            "packed": (self.num_embeddings, self.embedding_dim),
            "scale": (self.num_embeddings,),
        }
        return surgery.mismatch(self, shapes, {"packed": torch.int8})

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.packed) * F.embedding(input, self.scale.unsqueeze(-1))
        return rows.to(self.like.dtype)

    def dense_weight(self) -> Tensor:
        return self.packed.float() * self.scale.unsqueeze(-1)

    def weight_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim

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

    @classmethod
    def from_layer(cls, layer: nn.EmbeddingBag) -> Int8EmbeddingBag:
        """Quantize a float table."""
        new = cls(
            *kernels.quantize_weight(layer.weight),
            dtype=layer.weight.dtype,
            padding_idx=layer.padding_idx,
        )
        new.mode, new.include_last_offset = layer.mode, layer.include_last_offset
        surgery.record(
            new,
            "Int8EmbeddingBag",
            num_embeddings=new.num_embeddings,
            embedding_dim=new.embedding_dim,
            dtype=dtype_name(layer.weight.dtype),
        )
        return new

    @classmethod
    def rebuild(
        cls, module: nn.Module, num_embeddings: int, embedding_dim: int, dtype: str = "float32"
    ) -> Int8EmbeddingBag:
        """An empty table (on the meta device) in place of `module`, for a file's tensors."""
        new: Any = super().rebuild(module, num_embeddings, embedding_dim, dtype)
        new.mode = getattr(module, "mode", "mean")
        new.include_last_offset = getattr(module, "include_last_offset", False)
        return new

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
