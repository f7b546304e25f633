"""OpenAI's API for texts: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

Left out, and refused by name: tools, images and sound, penalties by frequency and presence,
logit_bias, forms of output, echo, suffix, best_of.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quantize.run.serve import state
from quantize.run.serve.answers import Answer, ChatAnswer, TextAnswer
from quantize.run.serve.batching import failed
from quantize.run.serve.errors import Refused, error_body
from quantize.run.serve.exchange import Events, answer, unless_gone
from quantize.run.serve.fields import Fields, texts, wrong
from quantize.run.serve.served import Decoder
from quantize.run.serve.writing import MOST_TOP, Asked, Texts, asked

DEFAULT_TOKENS = 16  # of a completion
ROLES = ("system", "developer", "user", "assistant", "tool")


async def models(request: Request) -> Response:
    """What is served."""
    data = [_described(model) for model in state.of(request).models.values()]
    return answer({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """One model."""
    return answer(_described(state.of(request).find(request.path_params["name"])))


def _described(model: state.Running) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "quantize",
    }


async def completions(request: Request) -> Response:
    """Continue a text, or several, streamed or whole."""

    def read(fields: Fields, decoder: Decoder, most: int) -> tuple[list[list[int]], Asked, Any]:
        top = fields.integer("logprobs", None, 0, MOST_TOP)
        fields.only("echo", False)
        fields.only("suffix", "")
        fields.only("best_of", 1)
        settings = asked(fields, "max_tokens", top)
        if settings.most_tokens is None:
            settings.most_tokens = DEFAULT_TOKENS
        given = texts("prompt", fields.take("prompt", ""), most)
        prompts = [decoder.encode(each) if isinstance(each, str) else each for each in given]
        return prompts, settings, TextAnswer

    return await _write(request, read)


async def chat(request: Request) -> Response:
    """Answer a conversation, streamed or whole."""

    def read(fields: Fields, decoder: Decoder, most: int) -> tuple[list[list[int]], Asked, Any]:
        wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", None, 0, MOST_TOP)
        if top is not None and not wanted:
            raise wrong("top_logprobs", top, "with logprobs: true")
        fields.only("tools", [])
        fields.only("tool_choice", "none", "auto")
        fields.only("response_format", {"type": "text"})
        fields.only("modalities", ["text"])
        fields.ignore("parallel_tool_calls")
        older = fields.integer("max_tokens", None, 1, 2**31)
        settings = asked(fields, "max_completion_tokens", (top or 0) if wanted else None)
        settings.most_tokens = settings.most_tokens or older
        ids = decoder.encode_chat(_messages(fields.take("messages")))
        return [ids], settings, ChatAnswer

    return await _write(request, read)


async def _write(
    request: Request,
    read: Callable[[Fields, Decoder, int], tuple[list[list[int]], Asked, type[Answer]]],
) -> Response:
    serving, fields, running = await state.read(request)
    count = state.Count(serving, running)
    with count.mistakes():
        if running.served.decoder is None:
            needed = "a decoder of the Llama family, or of bytes, with its tokenizer"
            raise Refused(f"{running.name} writes no text: that takes {needed}")
        prompts, settings, kind = read(fields, running.served.decoder, serving.settings.max_texts)
        fields.end()
        _check_prompts(prompts, settings, serving.settings.max_texts)
        written = Texts(running, prompts, settings)
        if settings.stream:
            running.check_room()
    identity = f"{kind.prefix}-{secrets.token_hex(12)}"
    about = {"id": identity, "created": int(time.time()), "model": running.name}
    made = kind(about, running.served.decoder, len(written.sequences))
    kept = serving.keeper.kept(request.client, settings.stream)
    if settings.stream:
        return Events(_streamed(written, made, count, settings), kept)
    with kept:
        return answer(await unless_gone(request, _whole(written, made, count)))


async def _whole(written: Texts, made: Answer, count: state.Count) -> dict[str, Any]:
    with count:
        async for piece in written.pieces():
            count.first_token()
            made.add(piece)
        count.tokens(written.prompt_tokens, written.written)
    return made.whole() | {"usage": written.usage()}


async def _streamed(
    written: Texts, made: Answer, count: state.Count, settings: Asked
) -> AsyncIterator[dict[str, Any]]:
    try:
        with count:
            for event in made.opening():
                yield event
            async for piece in written.pieces():
                count.first_token()
                yield made.part(piece)
            count.tokens(written.prompt_tokens, written.written)
            if settings.with_usage:
                yield made.chunk([]) | {"usage": written.usage()}
    except Exception as error:
        refused = error if isinstance(error, Refused) else failed(error)
        yield error_body(refused)


def _messages(given: object) -> list[dict[str, Any]]:
    """A conversation, each message with its role and text. Raises Refused for another form."""
    if not isinstance(given, list) or not given:
        raise wrong("messages", given, "a list of messages")
    messages = []
    for message in given:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise wrong("messages", message, f"messages with a role of {', '.join(ROLES)}")
        messages.append({**message, "content": _text_of(message.get("content"))})
    return messages


def _text_of(content: Any) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise wrong("messages", part, "a text, or parts of type text")
        if not isinstance(part.get("text"), str):
            raise wrong("messages", part, "parts with a text")
    return "".join(part["text"] for part in parts)


def _check_prompts(prompts: list[list[int]], settings: Asked, most: int) -> None:
    if not all(prompts):
        raise Refused("prompt is empty; it must have at least one token", field="prompt")
    total = len(prompts) * settings.choices
    if total > most:
        raise Refused(f"{total} texts in one request; allowed: {most}", field="n")


ROUTES = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat, methods=["POST"]),
]
