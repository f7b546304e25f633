"""Fusion: the fastest equal model. `fold` runs our own passes, `fuse` hands the result to a back
end and gives its file.

The model becomes a graph of operators (graph.py), which loses what inference doesn't need
(passes.py, folding.py), gets cheaper operators for the same values (cheaper.py), oneDNN kernels
that do a convolution or linear layer, its activation and the residual add in one go (kernels.py),
and results in memory that nobody reads any more (memory.py). torchscript.py writes the graph out as
TorchScript, folded.py runs it in Python, backends.py gives it to other engines. Each result is
compared with the model before it is returned (equality.py), and of several ways the fastest is
taken (planning.py).

Left out: training, kernels for GPUs, and models that decide on the data which way to go, unless
TorchScript can compile them.
"""

from quantize.run.fusion.fusing import BACKENDS, Contender, compare, fuse
from quantize.run.fusion.graph import CaptureError
from quantize.run.fusion.planning import Plan, fold, plan

__all__ = ["BACKENDS", "CaptureError", "Contender", "Plan", "compare", "fold", "fuse", "plan"]
