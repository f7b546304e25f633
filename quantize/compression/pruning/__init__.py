"""Structured pruning: channels, neurons and heads are removed, and the layers that read them are
repaired.
"""

from quantize.compression.pruning.exporting import traced_once
from quantize.compression.pruning.prune import prune_ln_structured

__all__ = ["prune_ln_structured", "traced_once"]
