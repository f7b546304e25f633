"""Instruction sets that the kernels are compiled for, and which of them this machine has.

Each level has all that the levels before it have. QUANTIZE_ISA caps the level, to see what other
machines compute (the same bits) and how fast.
"""

from __future__ import annotations

import os

import torch

from quantize.native import toolchain

SWITCH = "QUANTIZE_ISA"

# By level, the names of `torch.cpu.get_capabilities` that it needs.
_NEEDS = {
    "generic": (),
    "avx2": ("avx2", "fma3", "f16c"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    "vnni": ("avx512_vnni",),
    "amx": ("amx_tile", "amx_int8"),
    "dotprod": ("dot",),
}


def levels() -> list[str]:
    """The levels that this machine has, the best last, up to the one that QUANTIZE_ISA names.

    Raises: ValueError: QUANTIZE_ISA names no level.
    """
    most = os.environ.get(SWITCH)
    if most and most not in _NEEDS:
        raise ValueError(f"{SWITCH} must be one of {', '.join(_NEEDS)}, got {most!r}")
    has = torch.cpu.get_capabilities()
    found = []
    for level in toolchain.levels():
        if not all(has.get(name) for name in _NEEDS[level]):
            break
        found.append(level)
        if level == most:
            break
    return found
