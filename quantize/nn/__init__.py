"""What techniques put into a model: layers that store their weight in another form than the one in which it is read."""

from quantize.nn.protocol import (
    CompressedLayer,
    Operands,
    PackedLayer,
    dense_weight,
    dtype_name,
    dtype_named,
    is_transposed,
    operands,
)
from quantize.nn.reading import WeightReading

__all__ = [
    "CompressedLayer",
    "Operands",
    "PackedLayer",
    "WeightReading",
    "dense_weight",
    "dtype_name",
    "dtype_named",
    "is_transposed",
    "operands",
]
