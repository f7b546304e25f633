"""Quality of a model on held-out text or images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.calibration import in_eval_mode
from quantize.surgery import device_of


@torch.inference_mode()
def evaluate_text(
    model: nn.Module,
    text: Tensor,
    *,
    length: int = 256,
    overlap: int = 128,
    batch: int = 8,
    max_bytes: int | None = None,
) -> dict[str, float]:
    """Bits per byte and next-byte accuracy of `model(ids [B, T]) -> logits [B, T, V]` on a 1-D
    uint8 text.

    Windows of `length` bytes overlap by `overlap`: a byte is predicted from at least `overlap`
    bytes before it (the first bytes of the text excepted), and counted once. The very first byte is
    charged 8 bits. With `max_bytes`, only that many bytes are scored, in windows spread evenly over
    the text. A model should not be asked for longer windows than it was trained on.
    """
    if not 0 <= overlap < length:
        raise ValueError(f"overlap={overlap} must be >= 0 and less than length={length}")
    if len(text) < 2:
        raise ValueError(f"text holds {len(text)} bytes; at least 2 are needed to predict one")
    length = min(length, len(text) - 1)
    stride = length - min(overlap, length - 1)
    starts = list(range(0, len(text) - length, stride))
    if starts[-1] + length + 1 < len(text):
        starts.append(len(text) - length - 1)
    ends = [start + length + 1 for start in starts]  # targets of a window end here
    windows = [
        (start, end - max(previous, 1))
        for start, end, previous in zip(starts, ends, [1, *ends], strict=False)
    ]
    if max_bytes is not None:
        count = min(len(windows), max(1, max_bytes // stride))
        windows = [windows[i * len(windows) // count] for i in range(count)]
    device = device_of(model)
    nats, hits, scored = 0.0, 0, 0
    with in_eval_mode(model):
        for i in range(0, len(windows), batch):
            rows = [text[start : start + length + 1] for start, _ in windows[i : i + batch]]
            ids = torch.stack(rows).to(device).long()
            logits = model(ids[:, :-1]).float()
            for row, (_, new) in enumerate(windows[i : i + batch]):
                guess, target = logits[row, -new:], ids[row, -new:]
                nats += F.cross_entropy(guess, target, reduction="sum").item()
                hits += int((guess.argmax(-1) == target).sum())
                scored += new
    first = 1 if windows[0][0] == 0 else 0
    bits = nats / math.log(2) + 8 * first
    return {
        "bits_per_byte": bits / (scored + first),
        "accuracy": hits / scored,
        "bytes": scored + first,
    }


@torch.inference_mode()
def evaluate_images(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch: int = 256
) -> dict[str, float]:
    """Accuracy and mean cross-entropy (nats) of `model(images) -> logits [N, classes]`."""
    if len(images) == 0:
        raise ValueError("no images to evaluate on")
    device = device_of(model)
    hits, nats = 0, 0.0
    with in_eval_mode(model):
        for i in range(0, len(images), batch):
            logits, target = (
                model(images[i : i + batch].to(device)).float(),
                labels[i : i + batch].to(device),
            )
            hits += int((logits.argmax(-1) == target).sum())
            nats += F.cross_entropy(logits, target, reduction="sum").item()
    return {"accuracy": hits / len(images), "loss": nats / len(images), "images": len(images)}
