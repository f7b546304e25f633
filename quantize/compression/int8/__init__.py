"""Dynamic int8: `quantize_dynamic`.

`layers` says which layers can become int8, and converts them; `speed` which of them a stopwatch
finds slower; `outliers` which channels count in float; `rounding` the weights of recurrent layers
for their inputs; `shifts` the biases that bring back the means of outputs; `limit` which layers
cost too much of the output; `regions` which modules run in one native call; `transform` does all of
it to a model.
"""

from quantize.compression.int8.limit import tell_distance
from quantize.compression.int8.transform import quantize_dynamic

__all__ = ["quantize_dynamic", "tell_distance"]
