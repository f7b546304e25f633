"""Dynamic int8: linear layers store int8 weights and multiply in int8; activations are quantized as they come.

What is here: `quantize_dynamic` (the transform), `summary` (what it did), `Int8Linear`, `Int8Embedding` and
`Int8MultiheadAttention` (what it puts in),
`kernel` (force a kernel). What is not: training through int8 layers, and static activation scales (they need calibration data
that resembles what the model will see, and save little: a row's largest value is cheap to find).
"""

from quantize.int8.convert import quantize_dynamic, summary
from quantize.int8.embedding import Int8Embedding
from quantize.int8.kernels import kernel
from quantize.int8.linear import Int8Linear
from quantize.nn import ProjectedAttention as Int8MultiheadAttention

__all__ = ["Int8Embedding", "Int8Linear", "Int8MultiheadAttention", "kernel", "quantize_dynamic", "summary"]
