"""What a teacher answered, on disk: worth it when its forward pass costs more than reading its
likeliest classes back.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from quantize.checkpoint import atomic_write
from quantize.compression.distillation.losses import top_logits


class TeacherCache:
    """A folder with a file per batch: log probabilities (fp16) and ids (int32) of the likeliest
    classes of every row.

    Raises ValueError if the folder is another teacher's, or of another temperature or number of
    classes.
    """

    def __init__(self, folder: Path, teacher: str, temperature: float, count: int):
        self.folder, self.teacher = folder, teacher
        self.temperature, self.count = temperature, count
        about = {"teacher": teacher, "temperature": temperature, "count": count}
        folder.mkdir(parents=True, exist_ok=True)
        label = folder / "about.json"
        if label.exists():
            if json.loads(label.read_text()) != about:
                raise ValueError(
                    f"cache {str(folder)!r} holds another teacher's answers, or of other "
                    f"settings; delete it or name another"
                )
        else:
            with atomic_write(label) as file:
                file.write(json.dumps(about).encode())

    def get(self, index: int) -> tuple[Tensor, Tensor] | None:
        path = self.folder / f"{index}.pt"
        if not path.exists():
            return None
        stored = torch.load(path, weights_only=True)
        return stored["log_p"], stored["ids"]

    def put(self, index: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Store and return the likeliest classes of logits [..., V]."""
        log_p, ids = top_logits(logits, self.temperature, min(self.count, logits.shape[-1]))
        with atomic_write(self.folder / f"{index}.pt") as file:
            torch.save({"log_p": log_p.cpu(), "ids": ids.cpu()}, file)
        return log_p, ids
