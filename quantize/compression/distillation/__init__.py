"""Knowledge distillation: a student learns to answer like a teacher; a compressed model wins back
what it lost.

`distill` and `recover` (teach.py) train through `training.fit`, which minimizes what objective.py
says; `losses` has the formulas, `match` what is compared inside the models, `student` how a teacher
becomes a smaller model.
"""

from quantize.compression.distillation.losses import hidden_loss, soft_kl
from quantize.compression.distillation.student import make_student
from quantize.compression.distillation.teach import distill, recover

__all__ = ["distill", "hidden_loss", "make_student", "recover", "soft_kl"]
