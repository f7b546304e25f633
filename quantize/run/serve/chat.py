"""A conversation as the text that a model was trained on: the chat template of its folder.

Templates are Jinja programs that come with a model; they run in Jinja's sandbox, with the names
that transformers gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.models.published import read_json
from quantize.run.serve.errors import Refused

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """The template of a folder; `found` is False where it has none.

    Source: `transformers.PreTrainedTokenizerBase.apply_chat_template`.
    """

    def __init__(self, folder: Path | None) -> None:
        config = _config(folder)
        source = _source(folder, config)
        self.found = source is not None
        if source is None:
            return
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        self._template = environment.from_string(source)
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self._tokens = {name: _token(config.get(name)) for name in names}

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as a text that ends where the answer begins.

        Raises:
            Refused: no template, or messages that it doesn't take.
        """
        if not self.found:
            raise Refused("this model has no chat template: use /v1/completions", field="messages")
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._tokens
            )
        except TemplateError as error:
            raise Refused(f"the chat template refuses: {error}", field="messages") from None


def _config(folder: Path | None) -> dict[str, Any]:
    if folder is None or not (folder / CONFIG).is_file():
        return {}
    return read_json(folder / CONFIG)


def _source(folder: Path | None, config: Mapping[str, Any]) -> str | None:
    if folder is not None and (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    kept = config.get("chat_template")
    if isinstance(kept, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in kept}
        kept = named.get("default")
    return kept if isinstance(kept, str) else None


def _token(value: Any) -> str:
    """A special token, which is kept as a text or as an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
