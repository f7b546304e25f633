"""The definition of a transform: every transform on every model keeps every promise, or refuses by
name.

What is promised is in `invariants.py`; the models are in `models.py`, the transforms in
`transforms.py`, and the cells that are refused in `known.py`. A transform is what passes here.

Every suite runs all transforms on the models of `OFTEN` (of `GRAPHS` one in turn) and every odd
model with some transform (see `share`); the slow tests add more of them, and others' models.
`CONTRACT=whole uv run pytest tests/contract` runs all 1400 cells, in about six minutes of one core.

The policy, in plain words:

- The model that goes in comes out as it was: parameters, buffers, plain attributes, counters,
  training flags, hooks, gradients, classes; also when its forward changes some of these. So do the
  caller's inputs, and the process: random state, default dtype, threads, grad mode.
- The result is a new model that shares no memory with the old one. It starts from the old one's
  state: its first call answers as the old one's first call would, its second call as the second.
- It is called like the old model and answers in the same containers, shapes and dtypes, whatever
  dtype its weights have.
- What only replaces layers (half, int8, int4) leaves every module in the mode (training or eval)
  that it was in, and what replaces a module is in that module's mode. What runs the model (pruned,
  low rank, student, distilled, recovered) gives eval mode, as `load` does. `fuse` and `fold` refuse
  a model in training mode.
- Hooks stay on their module, and follow it to what replaces it; a layer whose hooks can't follow
  stays, with the reason.
- `requires_grad` stays; gradients are not copied.
- A copy, by `copy.deepcopy`, by pickle or by way of a file, answers bit for bit as the result does.
  A file holds what `state_dict` holds: other attributes, non-persistent buffers and hooks are those
  of the instance that `load` is given.
- `quantize.summary` names every layer, as done or as left with a reason, and (where inputs were at
  hand) the distance.
- A layer under two names is one layer. A layer that somebody else reads reads as the float weight
  it stands for.
- What can't be done is refused with a ValueError or TypeError of one or two sentences.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from contract.cells import Cell, examine
from contract.known import BROKEN, REFUSED
from contract.models import FOREIGN, ODD
from contract.transforms import TRANSFORMS

WHOLE = os.environ.get("CONTRACT") == "whole"
CHEAP = ("half bf16", "int8 smooth", "int4 calibrated", "low rank calibrated")
SLOWER = ("pruned calibrated", "recovered", "fused")
GRAPHS = ("fused", "folded")  # one program, built in two ways
# models with which all transforms run in every suite
OFTEN = (
    "mlp",
    "decoder",
    "alias",
    "tied",
    "prune mask after a step",
    "cosine head",
    "lora",
    "experts",
    "changes buffer",
    "counts calls",
    "forward hook",
    "in place",
    "data dependent",
    "keywords only",
    "nested",
    "training",
)


def share(transform: str, model: str) -> str:
    """What a run takes a cell for: "always" (one in seven with -m "not slow": see conftest.py),
    "slow" (none of them), or "" (only whole).

    Odd models meet one of the cheap transforms in every run. Slow runs add another one, one of the
    slower ones, and one of the cheap ones for others' architectures.
    """
    if model in OFTEN:
        turn = OFTEN.index(model) + GRAPHS.index(transform) if transform in GRAPHS else 0
        return "slow" if turn % len(GRAPHS) else "always"
    if transform in CHEAP:
        models = ODD if model in ODD else FOREIGN
        turn = (models.index(model) + CHEAP.index(transform)) % len(CHEAP)
        if model in ODD:
            return ("always", "", "slow", "")[turn]
        return "slow" if turn == 0 else ""
    if transform in SLOWER and model in ODD:
        turn = list(ODD).index(model) + SLOWER.index(transform)
        return "slow" if turn % len(SLOWER) == 0 else ""
    return ""


def cells() -> Iterator[Any]:
    """Every cell of this run, xfail where it is known to be broken."""
    for transform in TRANSFORMS:
        for model in (*ODD, *FOREIGN):
            taken = share(transform, model)
            if not (taken or WHOLE):
                continue
            marks = [] if taken == "always" else [pytest.mark.slow]
            if reason := BROKEN.get(transform, {}).get(model):
                marks.append(pytest.mark.xfail(strict=True, reason=reason))
            yield pytest.param(transform, model, marks=marks, id=f"{transform}-{model}")


@pytest.fixture(autouse=True)
def _quick(no_clock: None) -> None:
    """Candidates of a fusion don't race."""


@pytest.mark.parametrize(("transform", "model"), list(cells()))
def test_promises(transform: str, model: str):
    """The transform keeps all its promises on this model, or refuses it as the table says."""
    cell = examine(transform, model)
    assert not cell.broken, told(cell)
    expected = REFUSED.get(transform, {}).get(model, "")
    if expected:
        assert cell.refusal, f"now works: strike it from the table (was refused with {expected!r})"
        assert expected in cell.refusal
    else:
        assert not cell.refusal, f"worked before: {cell.refusal}"


def told(cell: Cell) -> str:
    """Broken promises, a line each."""
    lines = []
    for kind, problems in cell.broken.items():
        lines += [f"{kind}: {problem}" for problem in problems]
    return "\n".join(lines)
