"""The seed of torch's random numbers, for the devices that are in use.

`torch.manual_seed` also queues the seed for every kind of device that isn't there, each time with
the text of the call stack, and keeps both: milliseconds and some ten kilobytes a call, which a
training would spend in every step.
"""

from __future__ import annotations

import torch


def seed_devices(seed: int) -> None:
    """What `torch.manual_seed` does for the CPU, and for CUDA once something has run there.

    Args:
        seed: in [-2^63, 2^64).
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
