"""Low-rank factorization: a linear or convolution becomes two smaller ones, fitted to the data that
runs through it.

`maths` has the formulas, `spatial` those of convolutions split in space, `quantize.nn.low_rank` the
pair that replaces a layer, `budget` the ranks,
`spectra` the singular values that they are chosen by, `residuals` what the compressed model gets
wrong before a layer, `fit` the new weights, `factorize` the walk over a model. Left out:
scripts per architecture; any `nn.Module` is taken as it is. Left out too: one input factor for q,
k, v and one for gate, up. On the decoder that train.py trains it lost 0.030 bits per byte instead
of 0.031 at a ratio of 0.8, and 0.321 instead of 0.317 at 0.5. And, after timing: factors of which a
block is the identity, W = P [1; C] B, which hold rank^2 numbers less for the same function. Putting
the outputs in order costs more than that saves (128 x 128, 2048 rows, 2 threads, half of the
parameters: layer 0.37 ms, pair 0.25, identity form 0.78); in the order that needs no gather the
rows of C were 8 to 23 long instead of 3 to 5, and rounding errors of int8 or fp16 grow by that.
"""

from quantize.compression.low_rank.factorize import factorize_low_rank
from quantize.compression.low_rank.maths import whitened_svd
from quantize.nn.low_rank import LowRankConv1d, LowRankConv2d, LowRankLinear

__all__ = [
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankLinear",
    "factorize_low_rank",
    "whitened_svd",
]
