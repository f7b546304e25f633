"""Structured pruning: channels, neurons and heads are removed, and the layers that read them are
repaired.
"""

from quantize.compression.pruning.prune import Pruned, Summary, prune_ln_structured, summary

__all__ = ["Pruned", "Summary", "prune_ln_structured", "summary"]
