"""The oracle of decoding by itself: `generate` when the model's own forward runs every pass."""

from __future__ import annotations

import copy
from functools import partial

import helpers
import torch
from torch import nn

from quantize.run.generate import generate_stream

decoder = partial(helpers.decoder, noise=0.2)


PROMPT = torch.tensor([[1, 2, 3, 4, 5]])


def hooked(model: nn.Module) -> nn.Module:
    """A copy with a hook that does nothing, so that its own forward runs every pass."""
    twin = copy.deepcopy(model)
    twin.register_forward_hook(lambda *_: None)
    return twin


def eager(model: nn.Module, prompt: object = PROMPT, **options: object) -> torch.Tensor:
    """What `generate` gives when the model's own forward runs every pass: a hook has to be
    called.
    """
    run = generate_stream(hooked(model), prompt, **{"max_new_tokens": 20} | options)
    list(run)
    assert "hooks" in run.reason
    return run.result


def check(model: nn.Module, reason: str | None = None, **options: object) -> None:
    """The tokens are those of the model's own forward, and native code runs, or doesn't for
    `reason`.
    """
    run = generate_stream(model, PROMPT, **{"max_new_tokens": 20} | options)
    list(run)
    assert run.reason is None if reason is None else reason in (run.reason or "")
    assert torch.equal(run.result, eager(model, **options))
