"""Look into any module: run it on batches without a trace, and keep what the techniques need of
what its layers see.

`inputs` has batches and outputs, `differences` how far those of two models are apart; `state` what
a forward pass may change; `patches` the rows that a layer's weight multiplies; `squares` their
products, `sums` all sums over them, `statistics` those of a model's layers, `projected` those that
one weight shows; `gradients` how much the output depends on each layer's; `look` passes that show
all of that at once, `survey` as few of them as memory allows; `observe` single calls of layers,
`replay` those of two models side by side, `frontier` what modules of one are called with while
those before them change; `readers` who reads what a layer gives; `solve` least squares from
moments, `dual` from few rows, `refit` from parts; `exporting` what torch.export needs around it.
"""

from quantize.calibration.differences import (
    FarAway,
    distance,
    largest_difference,
    relative_error,
    warn_if_far,
)
from quantize.calibration.dual import Outer, compensate_rows, whole
from quantize.calibration.exporting import exporting
from quantize.calibration.frontier import Frontier
from quantize.calibration.gradients import fisher_loss
from quantize.calibration.inputs import (
    Beside,
    arguments,
    call,
    check_batches,
    copied,
    first_alone,
    in_eval_mode,
    keeps_cache,
    main_output,
    of_original,
    on_cpu,
    on_tensors,
    output_tensors,
    run_batch,
    watching,
    without_cache,
)
from quantize.calibration.observe import Call, Watch, find_streams
from quantize.calibration.patches import CONVOLUTIONS, exact, is_finite, rows, snapshot
from quantize.calibration.projected import Projected
from quantize.calibration.readers import followers
from quantize.calibration.refit import Regression
from quantize.calibration.replay import Pace, Walk
from quantize.calibration.solve import compensate, least_squares
from quantize.calibration.state import changed, untouched
from quantize.calibration.statistics import (
    Calls,
    check_reached,
    collect,
    input_shapes,
    reached,
    run_all,
    trace_calls,
)
from quantize.calibration.stored import Store
from quantize.calibration.sums import InputStatistics, PairedStatistics, Products
from quantize.calibration.survey import Survey

__all__ = [
    "CONVOLUTIONS",
    "Beside",
    "Call",
    "Calls",
    "FarAway",
    "Frontier",
    "InputStatistics",
    "Outer",
    "Pace",
    "PairedStatistics",
    "Products",
    "Projected",
    "Regression",
    "Store",
    "Survey",
    "Walk",
    "Watch",
    "arguments",
    "call",
    "changed",
    "check_batches",
    "check_reached",
    "collect",
    "compensate",
    "compensate_rows",
    "copied",
    "distance",
    "exact",
    "exporting",
    "find_streams",
    "first_alone",
    "fisher_loss",
    "followers",
    "in_eval_mode",
    "input_shapes",
    "is_finite",
    "keeps_cache",
    "largest_difference",
    "least_squares",
    "main_output",
    "of_original",
    "on_cpu",
    "on_tensors",
    "output_tensors",
    "reached",
    "relative_error",
    "rows",
    "run_all",
    "run_batch",
    "snapshot",
    "trace_calls",
    "untouched",
    "warn_if_far",
    "watching",
    "whole",
    "without_cache",
]
