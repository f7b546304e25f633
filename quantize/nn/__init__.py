"""What techniques put into a model: layers that store their weight in another form than the one in
which it is read.
"""

from quantize.nn.attention import ProjectedAttention
from quantize.nn.encoder import with_padded_encoders, without_fast_paths
from quantize.nn.projected import project, restore
from quantize.nn.protocol import (
    CompressedLayer,
    Operands,
    PackedLayer,
    dense_weight,
    dtype_name,
    dtype_named,
    holds_integers,
    is_traced,
    operands,
    own_class,
    write_weight,
)
from quantize.nn.reading import WeightReading
from quantize.surgery import is_transposed

__all__ = [
    "CompressedLayer",
    "Operands",
    "PackedLayer",
    "ProjectedAttention",
    "WeightReading",
    "dense_weight",
    "dtype_name",
    "dtype_named",
    "holds_integers",
    "is_traced",
    "is_transposed",
    "operands",
    "own_class",
    "project",
    "restore",
    "with_padded_encoders",
    "without_fast_paths",
    "write_weight",
]
