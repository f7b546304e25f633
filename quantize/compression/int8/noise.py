"""What random inputs say of an int8 model that was made without calibration.

The errors of its layers, which weights and the statistics of BatchNorm give, say less: they add up
or fade on the way to the outputs, and a recurrent layer carries them from step to step.
"""

from __future__ import annotations

import warnings

from torch import nn

from quantize import calibration as calibrating
from quantize import surgery
from quantize.compression.int8.samples import Sample

_FAR = 0.1  # a relative error of the outputs above it comes with a warning


def warn_of_noise(small: nn.Module, model: nn.Module, samples: list[Sample]) -> dict[str, str]:
    """How far the outputs of an int8 model are from the float model's on the first sample that it
    runs on too, as a setting to note; and a UserWarning where that is far, or where it runs on
    none.

    Both run as copies: a run leaves kernels' forms of weights behind.
    """
    copies = surgery.clone(small), surgery.shell(model)
    for sample in samples:
        try:
            distance = calibrating.distance(*copies, [sample.inputs])
        except Exception:  # a forward may raise anything
            continue
        if distance > _FAR:
            warnings.warn(
                f"int8: the outputs of {type(model).__name__} moved by {distance:.0%} on random "
                f"{sample.what}; calibration on your own shows how far they move there, and "
                f"max_error puts layers back into float",
                stacklevel=3,
            )
        return {"on_random_inputs": f"moved by {distance:.1%} on {sample.what}"}
    warnings.warn(
        f"int8: how far the outputs of {type(model).__name__} moved isn't known, and as a whole it "
        f"wasn't timed, since it runs on no random inputs; give calibration",
        stacklevel=3,
    )
    return {"on_random_inputs": "not compared or timed, since it runs on none"}
