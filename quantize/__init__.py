"""Make any PyTorch model smaller and faster on a CPU, and measure what it cost."""

from quantize.checkpoint import CheckpointError, load, read_metadata, save
from quantize.int8 import quantize_dynamic
from quantize.measure import Measurement, measure
from quantize.models import MLP, ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, MLPConfig
from quantize.precision import to_half

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "CheckpointError",
    "ConvNet",
    "ConvNetConfig",
    "DecoderConfig",
    "DecoderLM",
    "MLPConfig",
    "Measurement",
    "load",
    "measure",
    "quantize_dynamic",
    "read_metadata",
    "save",
    "to_half",
]
