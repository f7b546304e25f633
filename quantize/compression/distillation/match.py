"""What to match: the output that counts, and modules inside the two models whose outputs are
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration import least_squares, main_output
from quantize.compression.distillation.losses import hidden_loss

Names = Mapping[str, str] | Sequence[str]


def is_categories(output: Any) -> bool:
    """Is the output logits: named so, or a bare tensor [N, V] or [B, T, V], of at least two
    classes?
    """
    main = main_output(output)
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return (main is output or main is named) and main.ndim in (2, 3) and main.shape[-1] > 1


def row_mask(inputs: Any, output: Tensor) -> Tensor | None:
    """The attention mask among keyword inputs that has an entry per row of output [B, T, V]:
    padding shouldn't be matched.
    """
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = inputs.get(name) if isinstance(inputs, Mapping) else None
        if isinstance(mask, Tensor) and output.ndim == 3 and mask.shape == output.shape[:-1]:
            return mask
    return None


def pairs_of(names: Names | None, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Student module to teacher module, checked; a sequence of names stands for the same names in
    both.
    """
    if names is None:
        return {}
    if isinstance(names, str) or not isinstance(names, Mapping | Sequence):
        raise TypeError(
            f"hidden must be a dict from student to teacher module names, or a list of names, "
            f"got {names!r}"
        )
    pairs = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    for model, role, used in ((student, "student", pairs), (teacher, "teacher", pairs.values())):
        known = dict(model.named_modules(remove_duplicate=False))
        for name in used:
            if name not in known:
                near = [
                    k for k in known if k and k.rpartition(".")[2] == str(name).rpartition(".")[2]
                ][:3]
                hint = f"; similar: {', '.join(near)}" if near else ""
                raise ValueError(
                    f"hidden names {name!r}, which is no module of the {role} "
                    f"({type(model).__name__}){hint}"
                )
    return pairs


@contextmanager
def watching(model: nn.Module, names: Iterable[str]):
    """Yields a dict that holds, after each pass, the output of each named module (of its last
    call).
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = main_output(output)

        return hook

    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [modules[name].register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def aligned(
    name: str, target: str, seen: Mapping[str, Tensor], taught: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Outputs of a pair with their channels last. Channels are the one axis along which shapes
    differ; if none does, axis 1 of images [B, C, H, W] and the last of others.
    """
    s, t = seen[name], taught[target]
    differing = [i for i in range(s.ndim) if s.ndim == t.ndim and s.shape[i] != t.shape[i]]
    if s.ndim != t.ndim or s.ndim < 2 or len(differing) > 1 or differing == [0]:
        shapes = f"{list(s.shape)} of the student and {list(t.shape)} of the teacher"
        raise ValueError(
            f"hidden {name!r}: {target!r}: outputs {shapes} can't be matched; need shapes alike "
            f"but for the width"
        )
    usual = 1 if s.ndim == 4 else s.ndim - 1
    axis = differing[0] if differing else usual
    return s.movedim(axis, -1), t.movedim(axis, -1)


def _key(name: str) -> str:
    # a ModuleDict's keys hold no dot and mustn't be names of its own attributes
    return "map/" + name.replace(".", "/")


class Projections(nn.ModuleDict):
    """Maps from the student's widths to the teacher's, where they differ; learned beside the
    student, then dropped.
    """

    def add(self, name: str, student: Tensor, teacher: Tensor) -> None:
        """Add the map that is best in the least-squares sense from states [N, C] to [N, D]."""
        s, t = student.detach().float(), teacher.detach().float()
        gram = s.T @ s
        ridge = 1e-2 * gram.diagonal().mean().clamp(min=1e-12)
        nothing = s.new_zeros(t.shape[1], s.shape[1])
        weight = least_squares(gram, t.T @ s, nothing, ridge)  # [D, C]
        linear = nn.Linear(s.shape[1], t.shape[1], bias=False, device=s.device, dtype=s.dtype)
        linear.weight.data.copy_(weight)
        self[_key(name)] = linear

    def project(self, name: str, x: Tensor) -> Tensor:
        key = _key(name)
        return self[key](x.float()) if key in self else x


def compare_hidden(
    pairs: Mapping[str, str],
    seen: Mapping[str, Tensor],
    taught: Mapping[str, Tensor],
    projections: Projections,
    inputs: Any,
) -> Tensor:
    """Mean of `hidden_loss` over the pairs."""
    losses = []
    for name, target in pairs.items():
        s, t = aligned(name, target, seen, taught)
        losses.append(hidden_loss(projections.project(name, s), t, row_mask(inputs, s)))
    return torch.stack(losses).mean()
