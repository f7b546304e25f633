"""A model as it is served: what its path holds decides by which protocols it can be asked.

Any model with example inputs takes tensors; a decoder with its tokenizer (or one of bytes) writes
texts; an encoder with its tokenizer gives vectors or scores. Each is run once when it is opened, so
that layers are packed and code is compiled before the first request, and before workers are forked.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.checkpoint import CheckpointError
from quantize.clock import burst
from quantize.models import DecoderLM
from quantize.models.opening import open_model
from quantize.run.fusion.torchscript import load as load_torchscript
from quantize.run.generate import generate
from quantize.run.generate.checks import longest_text, stop_tokens_of
from quantize.run.generate.reader import vocabulary_size
from quantize.run.generate.text import Text
from quantize.run.serve.batching import LONG_S
from quantize.run.serve.chat import ChatTemplate
from quantize.run.serve.encoder import Encoder, is_encoder
from quantize.run.serve.fields import check_length
from quantize.run.serve.scheduler import Writer
from quantize.run.serve.tensors import TensorModel

LOG = logging.getLogger("quantize.serve")
BYTES = 256
USUAL_TOKENS = 32  # of a text that an encoder reads
TIMED_S = 0.02
GAIN = 1.5


class Decoder:
    """A decoder that writes texts.

    Args:
        model: maps ids [B, T] to logits [B, T, V].
        text: its tokenizer, or that of bytes.
        template: of its folder.
    """

    def __init__(self, model: nn.Module, text: Text, template: ChatTemplate) -> None:
        self.model, self.text, self.template = model, text, template
        self.vocabulary = vocabulary_size(model)
        self.stops = stop_tokens_of(model, None, self.vocabulary)
        self.writer = Writer(model)
        generate(model, [[0]], max_new_tokens=2, stop_tokens=())

    @property
    def most_tokens(self) -> int:
        """Tokens of a prompt and what follows it."""
        return longest_text(self.model) or 2**31 - 1

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt. Raises Refused for one that is far too long."""
        check_length(text, self.most_tokens)
        return self.text.encode(text)

    def encode_chat(self, messages: Any) -> list[int]:
        """The ids of a conversation; the template has written the special tokens out."""
        rendered = self.template(messages)
        check_length(rendered, self.most_tokens)
        tokenizer = self.text.tokenizer
        if tokenizer is None:
            return list(rendered.encode())
        return tokenizer.encode(rendered, add_special_tokens=False).ids

    def token_text(self, token: int) -> str:
        """One token by itself, for lists of probabilities; bytes that aren't text have names."""
        tokenizer = self.text.tokenizer
        if tokenizer is None:
            return chr(token) if token < 128 else f"bytes:\\x{token:02x}"
        text = tokenizer.decode([token], skip_special_tokens=False)
        name = tokenizer.id_to_token(token)
        return name if name and "\ufffd" in text else text


@dataclass(frozen=True)
class Served:
    """What is served under one name; the parts that this model can't be asked by are None.

    `call_s` are the seconds of a call for one request of usual size, on the threads of the one who
    opened it, `alone_s` those on one thread; 0 and infinite for a decoder, which isn't asked by
    calls.
    """

    name: str
    tensors: TensorModel | None = None
    decoder: Decoder | None = None
    encoder: Encoder | None = None
    call_s: float = 0.0
    alone_s: float = math.inf

    @property
    def is_short(self) -> bool:
        """Whether a call for one request may hold up an event loop."""
        return self.alone_s <= LONG_S

    def gains(self) -> bool:
        """Whether a call for one request is much shorter on all threads than on one."""
        return self.alone_s > GAIN * self.call_s


def open_served(path: Path, name: str, example_inputs: Any = None) -> Served:
    """What a file or folder holds, ready to be served.

    Args:
        path: anything that `open_model` takes, or a `.pt` that `fuse(...).save` wrote.
        name: to serve it under.
        example_inputs: for a model that has none of its own.

    Raises:
        CheckpointError: as `open_model`.
        ValueError: a model that can be asked by no protocol.
    """
    if path.exists():  # else there is one line, what is wrong
        LOG.info("%s: opening", name)
    if path.suffix == ".pt" and path.is_file():
        model = _open_torchscript(path)
    else:
        model = open_model(path)
    folder = path if path.is_dir() else None
    return serve_model(model, name, folder, example_inputs)


def serve_model(
    model: nn.Module, name: str, folder: Path | None = None, example_inputs: Any = None
) -> Served:
    """What is served of a model.

    Args:
        model: in eval mode, on the CPU.
        name: to serve it under.
        folder: holds its tokenizer and chat template, if there are any.
        example_inputs: for a model that has none of its own; the first axis is the batch.

    Raises:
        ValueError: a model that can be asked by no protocol.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(f"{name} is in training mode: call .eval()")
    has_tokenizer = folder is not None and (folder / "tokenizer.json").is_file()
    decoder = encoder = None
    LOG.info("%s: packing its weights, and running it once", name)
    # First, since a decoder's layers then hold their integers in the form of its passes alone.
    examples = example_inputs if example_inputs is not None else _examples(model)
    tensors = None if examples is None else TensorModel(model, examples)
    if _writes(model) and (has_tokenizer or vocabulary_size(model) == BYTES):
        text = Text(folder) if has_tokenizer else Text()
        decoder = Decoder(model, text, ChatTemplate(folder))
    elif folder is not None and has_tokenizer and is_encoder(model):
        encoder = Encoder(model, folder)
    if not (tensors or decoder or encoder):
        raise ValueError(
            f"{name}: a {type(model).__name__} without example inputs, and without the "
            f"tokenizer.json of a decoder or encoder: give --inputs"
        )
    if decoder is not None:
        return Served(name, tensors, decoder)
    call_s, alone_s = _call_s(tensors, encoder)
    return Served(name, tensors, None, encoder, call_s, alone_s)


def _call_s(tensors: TensorModel | None, encoder: Encoder | None) -> tuple[float, float]:
    """Seconds of a call for one request: on the caller's threads, and on one."""
    call, threads = _one_request(tensors, encoder), torch.get_num_threads()
    several = min(burst(call, TIMED_S))
    torch.set_num_threads(1)
    alone = min(burst(call, TIMED_S))
    torch.set_num_threads(threads)
    return several, alone


def _one_request(tensors: TensorModel | None, encoder: Encoder | None) -> Callable[[], object]:
    """The call for one request of usual size."""
    if encoder is not None:
        ids, _ = encoder.encode("a")
        text = encoder.checked((ids * USUAL_TOKENS)[: min(USUAL_TOKENS, encoder.most_tokens)])
        return lambda: encoder.answers([text])
    assert tensors is not None
    rows = {name: value[:1] for name, value in tensors.example.items()}
    return lambda: tensors(rows)


def _open_torchscript(path: Path) -> nn.Module:
    try:
        return load_torchscript(str(path)).eval()
    except Exception as error:  # torch's parsers raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: isn't a fused model: {reason}") from None


def _writes(model: nn.Module) -> bool:
    return isinstance(model, DecoderLM) or type(model).__name__.endswith("ForCausalLM")


def _examples(model: Any) -> Any:
    """Example inputs that a model brings along: ours, or those of transformers."""
    if isinstance(model, DecoderLM):
        return model.example_inputs()[:, :8]
    own: Any = getattr(model, "example_inputs", None)
    if callable(own):
        return own()
    dummies = getattr(model, "dummy_inputs", None)
    if not isinstance(dummies, Mapping) or not dummies:
        return None
    examples: dict[str, Any] = dict(dummies)
    if "attention_mask" in inspect.signature(model.forward).parameters and "input_ids" in examples:
        examples.setdefault("attention_mask", torch.ones_like(examples["input_ids"]))
    return examples


def default_name(path: Path) -> str:
    """The name of a path without its suffix; a path's own name, never its place."""
    return path.resolve().stem or "model"
