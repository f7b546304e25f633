"""Make any PyTorch model smaller and faster on a CPU, and measure what it cost."""

from quantize.checkpoint import CheckpointError, load, read_metadata, save, summary
from quantize.compression.distillation import distill, make_student, recover
from quantize.compression.half import to_half
from quantize.compression.int4 import quantize_weights
from quantize.compression.int8 import quantize_dynamic
from quantize.compression.low_rank import factorize_low_rank
from quantize.compression.pruning import prune_ln_structured
from quantize.compression.recipe import (
    Given,
    Half,
    Int4,
    Int8,
    LowRank,
    Prune,
    Recipe,
    Recover,
    Student,
    write_by_block,
)
from quantize.compression.search import Result, compress
from quantize.measuring.comparison import measure
from quantize.measuring.result import Measurement
from quantize.models import MLP, ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, MLPConfig
from quantize.models.opening import open_model, save_folder
from quantize.run.decoding import for_decoding
from quantize.run.fusion import fold, fuse
from quantize.run.generate import generate, generate_stream
from quantize.run.kv_cache import CachedAttention, KVCache

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "CachedAttention",
    "CheckpointError",
    "ConvNet",
    "ConvNetConfig",
    "DecoderConfig",
    "DecoderLM",
    "Given",
    "Half",
    "Int4",
    "Int8",
    "KVCache",
    "LowRank",
    "MLPConfig",
    "Measurement",
    "Prune",
    "Recipe",
    "Recover",
    "Result",
    "Student",
    "compress",
    "distill",
    "factorize_low_rank",
    "fold",
    "for_decoding",
    "fuse",
    "generate",
    "generate_stream",
    "load",
    "make_student",
    "measure",
    "open_model",
    "prune_ln_structured",
    "quantize_dynamic",
    "quantize_weights",
    "read_metadata",
    "recover",
    "save",
    "save_folder",
    "summary",
    "to_half",
    "write_by_block",
]
