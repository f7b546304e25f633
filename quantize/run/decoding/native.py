"""step.cpp, compiled and called: a pass over some tokens as C calls on the tensors of a model and
its cache.

Left out, and so left to the model itself: prompts of models with float weights whose products of
many rows PyTorch has (see `reads_prompts`), layers of other kinds than this package's own, hooks,
CUDA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.allocator import use_huge_pages
from quantize.host import usable_cores
from quantize.models import DecoderLM
from quantize.nn.half import HalfLinear
from quantize.nn.int4 import Int4Linear
from quantize.nn.int8 import Int8Linear
from quantize.nn.int8_outliers import Int8OutlierLinear
from quantize.nn.low_rank import LowRankLinear
from quantize.run.decoding.caches import view_of
from quantize.run.decoding.packing import PANEL, Panels, float16_of, panels_of
from quantize.run.decoding.recognition import (
    KINDS,
    linears,
    reads_prompts,
    stored_in,
)
from quantize.run.decoding.sizes import blocks_of
from quantize.run.decoding.structs import KERNELS, NORMS, Layer, Linear, Model, Pass
from quantize.run.kv_cache import KVCache

# Rows of a pass over float weights: above, a product of matrices is faster than that many of a
# matrix and a vector.
MOST_ROWS = 16
PIECE_ROWS = 512  # rows of a call: bounds the memory of activations


class Step:
    """Runs passes of `model`. narrow: float32 weights of float16 layers are read in 16 bits, and
    held so.
    """

    def __init__(self, model: DecoderLM, *, narrow: bool = True):
        self.model, self.narrow = model, narrow
        functions = KERNELS.best().functions
        self.run, self._fetch_lines = functions.decode, functions.fetch_lines
        self.reads_prompts = reads_prompts(model)
        self.most_threads = usable_cores()  # one beyond the quota stops, and all others wait for it
        self.kept: list[object] = []  # what the pointers point to
        config = model.config
        layers = (Layer * len(model.blocks))()
        for layer, block in zip(layers, blocks_of(model), strict=True):
            for name, linear in linears(block).items():
                setattr(layer, name, self._linear(linear))
            parts = (
                block.attention_norm,
                block.ffn_norm,
                block.attention.q_norm,
                block.attention.k_norm,
            )
            for name, norm in zip(NORMS, parts, strict=True):
                setattr(layer, name, self._keep(getattr(norm, "weight", None), torch.float32))
        self.kept.append(layers)
        with torch.device("cpu"):  # whatever the default is
            frequencies = model.rope_frequencies()
        self.described = Model(
            len(layers), config.width, config.head_dim, config.norm_eps, config.rope_scale,
            self._keep(frequencies, torch.float32), self._keep(model.norm.weight, torch.float32),
            ctypes.addressof(layers), self._linear(model.head),
        )  # fmt: skip
        self.vocabulary = model.head.out_features
        self.answers = model.head._reads if isinstance(model.head, HalfLinear) else None
        self.shapes = [block.attention.cache_shape[:2] for block in blocks_of(model)]
        use_huge_pages(self._blocks())

    def __call__(self, ids: Tensor, cache: KVCache, logits_to_keep: int) -> Tensor | None:
        """Logits of the last tokens, all for 0; None for a pass that is left to the model, which
        may refuse it by name.
        """
        if not self._takes(ids, cache) or logits_to_keep < 0:
            return None
        batch, tokens = ids.shape
        embedded = self.embed(ids)
        if embedded is None:
            return None
        pad = None if cache.pad is None else cache.pad.cpu().contiguous()
        if not _fits_pad(pad, batch):
            return None
        view = view_of(cache, self.shapes, tokens, embedded.dtype)
        if view is None:
            return None
        keep = min(logits_to_keep, tokens) or tokens
        found = []
        for start, end, kept in _pieces(batch, tokens, keep):
            x = widened(embedded[:, start:end])
            logits = torch.empty(batch, kept, self.vocabulary, dtype=torch.float32, device="cpu")
            request = Pass(
                batch=batch,
                tokens=end - start,
                length=cache.length + start,
                keep=kept,
                kind=KINDS[view.dtype],
                threads=self.threads,
                pad=None if pad is None else pad.data_ptr(),
                held=view.address,
                x=x.data_ptr(),
                logits=logits.data_ptr(),
            )
            self.run(self.described, request)
            found.append(logits)
        cache.close(tokens)
        logits = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return logits.to(self.answers or embedded.dtype)

    @property
    def threads(self) -> int:
        return min(torch.get_num_threads(), self.most_threads)

    def embed(self, ids: Tensor) -> Tensor | None:
        """The embeddings [B, T, width] of ids [B, T]; None if the model's are of another shape."""
        embedded = self.model.embedding(ids).detach()
        return embedded if embedded.shape == (*ids.shape, self.described.width) else None

    def fetch(self, addresses: Tensor) -> None:
        """Ask memory for what lies at addresses, int64 [N], whatever that is."""
        self._fetch_lines(addresses.data_ptr(), len(addresses))

    def addresses(self) -> set[int]:
        """Of the tensors that passes read where they are."""
        return {start for start, _ in self._blocks()}

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Address and bytes of all weights."""
        for kept in self.kept:
            weight = kept.weight if isinstance(kept, Panels) else kept
            if isinstance(weight, Tensor):
                yield weight.data_ptr(), weight.nbytes

    def _takes(self, ids: Tensor, cache: KVCache) -> bool:
        if ids.dim() != 2 or ids.device.type != "cpu" or ids.numel() == 0:
            return False
        if not self.reads_prompts and (not cache.length or ids.numel() > MOST_ROWS):
            return False
        return ids.shape[0] == cache.batch

    def _linear(self, layer: nn.Module) -> Linear:
        if type(layer) is LowRankLinear:
            first = self._linear(layer.first)
            self.kept.append(first)
            outer = self._linear(layer.second)
            outer.first = ctypes.pointer(first)
            return outer
        integers = isinstance(layer, Int8Linear | Int4Linear)
        panels = panels_of(layer) if integers else None  # before anything else refers to the weight
        narrow = float16_of(layer) if self.narrow and type(layer) is HalfLinear else None
        stored = stored_in(layer)
        if stored is None:
            raise TypeError(f"a {type(layer).__name__} has no operands")
        if panels is None:
            weight = stored.weight if narrow is None else narrow
            panels = Panels(weight.detach().contiguous())
        self.kept.append(panels)
        described = Linear(
            kind=KINDS[panels.weight.dtype],
            outputs=layer.out_features,
            inputs=layer.in_features,
            group=stored.group,
            weight=panels.weight.data_ptr(),
            scale=self._keep(stored.scale, torch.float32) if panels.sums is not None else None,
            sums=None if panels.sums is None else panels.sums.data_ptr(),
            bias=self._keep(stored.bias, torch.float32),
        )
        if type(layer) is Int8OutlierLinear:
            own = layer.outliers()
            missing = -layer.out_features % PANEL
            described.outliers = len(own.channels)
            described.factor = self._keep(own.factor, torch.float32)
            described.channels = self._keep(own.channels, torch.int64)
            described.kept = self._keep(F.pad(own.kept, (0, missing)), torch.float32)
        return described

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """The address of a tensor's values, contiguous and in `dtype`; they live as long as this
        object.
        """
        if tensor is None:
            return None
        tensor = tensor.detach().to(dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()


def _fits_pad(pad: Tensor | None, batch: int) -> bool:
    if pad is None:
        return True
    return pad.shape == (batch,) and pad.dtype == torch.int64 and int(pad.min()) >= 0


def _pieces(batch: int, tokens: int, keep: int) -> Iterator[tuple[int, int, int]]:
    """Start and end of each call's tokens, and how many at its end get logits; the last `keep` of
    all do.
    """
    step = max(1, PIECE_ROWS // batch)
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        yield start, end, max(0, end - max(start, tokens - keep))


def widened(embedded: Tensor) -> Tensor:
    """Embeddings as a pass takes them, and overwrites: a copy in fp32."""
    return embedded.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
