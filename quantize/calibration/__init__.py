"""Look into any module: run it on batches without a trace, and keep what the techniques need of
what its layers see.

`inputs` has batches, outputs and the distance between two models; `state` what a forward pass may
change; `patches` the rows that a layer's weight multiplies; `sums` sums over them, `statistics`
those of a model's layers; `gradients` how much the output depends on each layer's; `look` passes
that show all of that at once, `survey` as few of them as memory allows; `observe` single calls of
layers, `replay` those of two models side by side; `readers` who reads what a layer gives; `refit`
least squares; `exporting` what torch.export needs around it.
"""

from quantize.calibration.exporting import exporting
from quantize.calibration.gradients import collect_gradients, fisher_loss
from quantize.calibration.inputs import (
    arguments,
    call,
    check_batches,
    copied,
    distance,
    keeps_cache,
    main_output,
    on_tensors,
    output_tensors,
    relative_error,
    run_batch,
    watching,
    without_cache,
)
from quantize.calibration.observe import Call, Watch, find_streams
from quantize.calibration.patches import exact, is_finite, rows
from quantize.calibration.readers import followers
from quantize.calibration.refit import Regression, compensate, least_squares
from quantize.calibration.replay import Pace, Walk
from quantize.calibration.state import untouched
from quantize.calibration.statistics import (
    Calls,
    check_reached,
    collect,
    input_shapes,
    reached,
    trace_calls,
)
from quantize.calibration.sums import InputStatistics, PairedStatistics, Products
from quantize.calibration.survey import Survey

__all__ = [
    "Call",
    "Calls",
    "InputStatistics",
    "Pace",
    "PairedStatistics",
    "Products",
    "Regression",
    "Survey",
    "Walk",
    "Watch",
    "arguments",
    "call",
    "check_batches",
    "check_reached",
    "collect",
    "collect_gradients",
    "compensate",
    "copied",
    "distance",
    "exact",
    "exporting",
    "find_streams",
    "fisher_loss",
    "followers",
    "input_shapes",
    "is_finite",
    "keeps_cache",
    "least_squares",
    "main_output",
    "on_tensors",
    "output_tensors",
    "reached",
    "relative_error",
    "rows",
    "run_batch",
    "trace_calls",
    "untouched",
    "watching",
    "without_cache",
]
