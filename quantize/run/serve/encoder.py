"""An encoder with its tokenizer: texts to vectors, and pairs of texts to scores.

Vectors are means over a text's tokens, or its first token where the folder's
`1_Pooling/config.json` says so, scaled to length 1. Scores come from a classifier with one output,
through a sigmoid (a cross-encoder), or are cosines of vectors. A text that is longer than the model
is refused, not cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.models.published import read_json
from quantize.run.generate.text import Text
from quantize.run.serve.batching import Job
from quantize.run.serve.errors import Refused
from quantize.run.serve.fields import check_length
from quantize.run.serve.tensors import named_outputs

POOLING = Path("1_Pooling") / "config.json"


class Encoder:
    """A model that reads whole texts.

    Args:
        model: takes `input_ids` and `attention_mask` [B, T]; gives `last_hidden_state` [B, T, H] or
            `logits` [B, 1].
        folder: holds its tokenizer.json.

    Raises:
        ValueError: no tokenizer, or one that needs a package which isn't installed.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        tokenizer: Any = Text(folder).tokenizer
        self.model, self.tokenizer = model, tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = getattr(model, "config", None)
        self.most_tokens = getattr(config, "max_position_embeddings", None) or 512
        if getattr(config, "model_type", None) in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            self.most_tokens -= 2  # their positions begin behind the padding's
        self.pad = getattr(config, "pad_token_id", None) or 0
        self.first_token = _pools_first_token(folder)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self.scores = self._outputs([self.encode("a")]).keys() >= {"logits"}

    def encode(self, text: str, other: str | None = None) -> Any:
        """Ids and types of a text, or of a pair. Raises Refused for one that is too long."""
        check_length(text + (other or ""), self.most_tokens)
        encoding = self.tokenizer.encode(text, other)
        return self.checked(encoding.ids, encoding.type_ids)

    def checked(self, ids: Sequence[int], types: Sequence[int] | None = None) -> tuple[list, list]:
        """Token ids that the model can read. Raises Refused for none, too many, or unknown ones."""
        size = self.tokenizer.get_vocab_size()
        if not ids or len(ids) > self.most_tokens:
            raise Refused(f"a text has {len(ids)} tokens; allowed: 1 to {self.most_tokens}")
        if min(ids) < 0 or max(ids) >= size:
            raise Refused(f"a text holds a token id outside 0 to {size - 1}")
        return list(ids), list(types or [0] * len(ids))

    def job(self, encoded: tuple[list, list]) -> Job:
        """One text as a job."""
        return Job(encoded, 1, len(encoded[0]))

    def run(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """What `answers` gives for the texts of some jobs."""
        return self.answers([job.content for job in jobs])

    def answers(self, encoded: Sequence[tuple[list, list]]) -> Sequence[Any]:
        """A vector [H] for each text, or a score where the model gives scores."""
        outputs = self._outputs(encoded)
        if self.scores:
            return outputs["logits"].float().sigmoid().flatten().tolist()
        return list(self._pooled(outputs))

    def _outputs(self, encoded: Sequence[tuple[list, list]]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in encoded)
        ids = torch.full((len(encoded), longest), self.pad)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (given, kinds) in enumerate(encoded):
            ids[row, : len(given)] = torch.tensor(given)
            types[row, : len(given)] = torch.tensor(kinds)
            mask[row, : len(given)] = 1
        options = {"token_type_ids": types} if self._takes_types else {}
        with torch.no_grad():
            output = self.model(input_ids=ids, attention_mask=mask, **options)
        return named_outputs(output) | {"mask": mask}

    def _pooled(self, outputs: dict[str, Tensor]) -> Tensor:
        """Vectors [B, H] of length 1."""
        hidden = outputs["last_hidden_state"].float()
        if self.first_token:
            return F.normalize(hidden[:, 0], dim=-1)
        mask = outputs["mask"][..., None].float()
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _pools_first_token(folder: Path) -> bool:
    if not (folder / POOLING).is_file():
        return False
    config = read_json(folder / POOLING)
    if config.get("pooling_mode_cls_token"):
        return True
    if not config.get("pooling_mode_mean_tokens", True):
        raise ValueError(f"{POOLING} asks for a pooling that isn't served: mean and cls are")
    return False


def is_encoder(model: nn.Module) -> bool:
    """Whether a model reads texts of transformers' form and gives vectors or one score."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    names = inspect.signature(model.forward).parameters
    if not {"input_ids", "attention_mask"} <= names.keys():
        return False
    classifies = hasattr(model, "classifier") or hasattr(model, "score")
    if type(model).__name__.endswith("ForSequenceClassification"):
        return classifies and getattr(config, "num_labels", 0) == 1
    return type(model).__name__.endswith("Model") and not getattr(config, "is_decoder", False)
