"""Low-rank factorization: a linear or convolution becomes two smaller ones, fitted to the data that runs through it.

`maths` has the formulas, `layers` the pair that replaces a layer, `budget` the ranks, `factorize` the walk over a model. Left
out: scripts per architecture; any `nn.Module` is taken as it is.
"""

from quantize.low_rank.factorize import factorize_low_rank, summary
from quantize.low_rank.layers import LowRankConv2d, LowRankLinear
from quantize.low_rank.maths import whitened_svd

__all__ = ["LowRankConv2d", "LowRankLinear", "factorize_low_rank", "summary", "whitened_svd"]
