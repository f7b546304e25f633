"""Int8Embedding: an embedding table whose rows are int8."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from quantize import surgery
from quantize.int8 import kernels


@surgery.builder
class Int8Embedding(nn.Module):
    """Look-up in a table of int8 rows: ids `[...]` to vectors `[..., embedding_dim]` in the dtype of `scale`.

    `weight` int8 `[num_embeddings, embedding_dim]`, `scale` `[num_embeddings]`.
    Both can be shared with an `Int8Linear`: a tied head.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def from_weight(cls, weight: torch.Tensor) -> Int8Embedding:
        """Quantize a float table `[num_embeddings, embedding_dim]`."""
        new = cls(*kernels.quantize_weight(weight))
        surgery.record(new, "Int8Embedding", num_embeddings=new.num_embeddings, embedding_dim=new.embedding_dim)
        return new

    @classmethod
    def rebuild(cls, module: nn.Module, num_embeddings: int, embedding_dim: int) -> Int8Embedding:
        """An empty table (on the meta device) in place of `module`, for a file's tensors."""
        return cls(
            torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device="meta"),
            torch.empty(num_embeddings, device="meta"),
        ).train(module.training)

    def contradiction(self) -> str | None:
        """See `surgery.contradiction`."""
        shapes = {"weight": (self.num_embeddings, self.embedding_dim), "scale": (self.num_embeddings,)}
        return surgery.mismatch(self, shapes, {"weight": torch.int8})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight) * F.embedding(ids, self.scale.unsqueeze(-1))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
