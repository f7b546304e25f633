"""Change any module: find modules in a copy, replace or resize them, and write down what was done.

Every technique goes through here. `edit` changes a model, `record` keeps what a file must repeat
(the structure record) and what a person wants to know (the notes: what was done, what was left, and
why), `sizes` tells whether a module agrees with its own tensors.
"""

from quantize.surgery.asked import asked_classes, bound_layers, written_layers
from quantize.surgery.candidates import (
    Facts,
    check_finite,
    check_initialised,
    facts,
    holders,
    holds_matrix,
    is_transposed,
    obstacle,
    round_stored,
    stays_float,
    take_place,
)
from quantize.surgery.computed import computing_hooks, recompute_weights
from quantize.surgery.edit import (
    Skip,
    at,
    check_editable,
    clone,
    deepcopy,
    device_of,
    exchange,
    is_eager,
    rebuild,
    replace,
    shell,
    skip_filter,
    uncompiled,
)
from quantize.surgery.experts import expert_weights, has_inputs_first
from quantize.surgery.following import traced_followers, without_logs
from quantize.surgery.norms import absorb, fold_norms, is_plain, own_norms, split_norms
from quantize.surgery.record import (
    Note,
    Summary,
    amend,
    builder,
    check_count,
    join,
    note,
    note_distance,
    notes,
    record,
    shortened,
    structure,
)
from quantize.surgery.resizing import resize, resized
from quantize.surgery.sizes import contradiction, mismatch, parameter_count, unlike

__all__ = [
    "Facts",
    "Note",
    "Skip",
    "Summary",
    "absorb",
    "amend",
    "asked_classes",
    "at",
    "bound_layers",
    "builder",
    "check_count",
    "check_editable",
    "check_finite",
    "check_initialised",
    "clone",
    "computing_hooks",
    "contradiction",
    "deepcopy",
    "device_of",
    "exchange",
    "expert_weights",
    "facts",
    "fold_norms",
    "has_inputs_first",
    "holders",
    "holds_matrix",
    "is_eager",
    "is_plain",
    "is_transposed",
    "join",
    "mismatch",
    "note",
    "note_distance",
    "notes",
    "obstacle",
    "own_norms",
    "parameter_count",
    "rebuild",
    "recompute_weights",
    "record",
    "replace",
    "resize",
    "resized",
    "round_stored",
    "shell",
    "shortened",
    "skip_filter",
    "split_norms",
    "stays_float",
    "structure",
    "take_place",
    "traced_followers",
    "uncompiled",
    "unlike",
    "without_logs",
    "written_layers",
]
