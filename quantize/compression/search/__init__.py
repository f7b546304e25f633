"""`compress`: the best model for what one can afford, found by trying and measuring.

`finding` has the call and `result` what it returns. `budget` says what must be reached, `judge`
what a model has lost by the user's metric, `divergence` by its outputs. `trial` makes and measures
points, `points` keeps them, `walk` tries until the minutes are over, and `choosing` picks one.
Which recipe for the whole model comes next is said by `strategy`, which blocks can go by `depth`,
which option for each layer by `layered`: `units` has the options, `times` how long they take,
`knapsack` solves for the best ones, `fits` corrects by what was measured. Left out: fused graphs,
which are no files of this package's own.
"""

from quantize.compression.search.finding import compress
from quantize.compression.search.result import Result

__all__ = ["Result", "compress"]
