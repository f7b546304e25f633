"""`compress`: the best model for what one can afford, found by trying and measuring.

`budget` says what must be reached, `judge` what a model has lost, `trial` makes and measures one
point, `strategy` says which to try next, `walk` tries until the minutes are over. Left out: a
choice layer by layer; a point is a recipe for the whole model.
"""

from quantize.compression.search.walk import Result, compress

__all__ = ["Result", "compress"]
