"""What a request may be, checked before any work: prompts, stop tokens and strings, the length of
the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Prompt = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


def check_ids(name: str, ids: Tensor, vocabulary: int | None) -> None:
    """Raises ValueError for a token id that the model doesn't have."""
    low, high, most = int(ids.min()), int(ids.max()), (vocabulary or 2**63) - 1
    if low < 0 or high > most:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds token id {wrong}; allowed: 0 to {most}")


def check_length(model: nn.Module, prompt: int, new: int) -> None:
    """Raises ValueError for a text that is longer than the model is good for."""
    limit = longest_text(model)
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"{prompt} prompt tokens + {new} new ones pass the limit of {limit} of "
            f"{type(model).__name__}; "
            f"for longer text give a KVCache with a window"
        )


def stop_tokens_of(
    model: nn.Module, given: int | Sequence[int] | None, vocabulary: int | None
) -> list[int]:
    """The ids that end a row: those given, or the model's own."""
    if given is None:
        for holder in ("generation_config", "config"):
            own = getattr(getattr(model, holder, None), "eos_token_id", None)
            if own is not None:
                return [own] if isinstance(own, int) else list(own)
        return []
    stops = [given] if isinstance(given, int) else list(given)
    most = (vocabulary or 2**63) - 1
    for token in stops:
        if not isinstance(token, int) or not 0 <= token <= most:
            raise ValueError(f"stop_tokens holds {token!r}; allowed: ids 0 to {most}")
    return stops


def longest_text(model: nn.Module) -> int | None:
    """In tokens, by a config of transformers, whose max_length is no limit, or by ours."""
    config = getattr(model, "config", None)
    ours = getattr(config, "max_length", None)
    limit = getattr(config, "max_position_embeddings", ours)
    return limit if isinstance(limit, int) else None


def as_ids(prompt: Prompt) -> tuple[Tensor, Tensor | None]:
    """ids [B, T] and, for rows of different length, how many positions of each are empty on the
    left [B].
    """
    if isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"prompt must hold integer token ids, got {prompt.dtype}")
        if prompt.dim() != 2 or 0 in prompt.shape:
            raise ValueError(
                f"prompt must be [B, T] with at least one row and one token, got "
                f"{list(prompt.shape)}"
            )
        return prompt.long(), None
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        raise TypeError(
            f"prompt must be ids [B, T] or a list of lists of ids, got {type(prompt).__name__}"
        )
    rows = []
    for i, row in enumerate(prompt):
        if not isinstance(row, Tensor):
            row = torch.tensor(row if isinstance(row, Sequence) else [row], device="cpu")
        if row.dim() != 1 or not len(row) or row.is_floating_point():
            raise ValueError(
                f"prompt {i} must be a 1-D list of at least one token id, got {row.dtype} "
                f"{list(row.shape)}"
            )
        rows.append(row.long())
    if not rows:
        raise ValueError("prompt is an empty list; give at least one row")
    longest = max(map(len, rows))
    pad = torch.tensor([longest - len(row) for row in rows], device="cpu")
    ids = torch.stack(
        [torch.nn.functional.pad(row, (int(p), 0)) for row, p in zip(rows, pad, strict=True)]
    )
    return ids, pad if bool(pad.any()) else None
