"""What the scripts do: `training` trains, compresses, measures; `fusing` and `caching` show one
model's file.

`presets` has the models that `train.py` trains and the recipes that it makes of them.
"""

from quantize.jobs.caching import show_cache
from quantize.jobs.fusing import fuse_file
from quantize.jobs.presets import PRESETS, VARIANTS, Preset, recipes
from quantize.jobs.training import Job, prepare, train_baseline

__all__ = [
    "PRESETS",
    "VARIANTS",
    "Job",
    "Preset",
    "fuse_file",
    "prepare",
    "recipes",
    "show_cache",
    "train_baseline",
]
