"""Requests for texts: what is asked for, and the pieces of text that come, with their tokens.

The pieces are the same whether they are streamed or put together. A stop string, and what might
become one, isn't let through; the text of an end token isn't either.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from quantize.run.serve.errors import Refused
from quantize.run.serve.fields import Fields, wrong
from quantize.run.serve.sequence import Sequence, Token
from quantize.run.serve.served import Decoder
from quantize.run.serve.state import Running
from quantize.run.serve.stopping import StopStrings

MOST_STOPS, MOST_CHOICES, MOST_TOP = 16, 16, 20
IDLE = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclass
class Asked:
    """The settings of a request that are the same for its texts and its conversation."""

    choices: int
    most_tokens: int | None
    stops: list[str]
    stream: bool
    with_usage: bool
    top: int | None
    options: dict[str, Any]


def asked(fields: Fields, most_tokens: str, top: int | None) -> Asked:
    """What a request asks for.

    Args:
        fields: of its JSON.
        most_tokens: the name of its limit.
        top: how many probable tokens it wants beside each.

    Raises:
        Refused: naming the field that is wrong, or that isn't supported.
    """
    fields.only("presence_penalty", 0)
    fields.only("frequency_penalty", 0)
    fields.only("logit_bias", {})
    fields.ignore(*IDLE)
    stream = fields.flag("stream")
    stream_options = fields.take("stream_options", {})
    if not isinstance(stream_options, dict) or (stream_options and not stream):
        raise wrong("stream_options", stream_options, "an object, with stream: true")
    with_usage = Fields(stream_options)
    include = with_usage.flag("include_usage")
    with_usage.ignore("include_obfuscation")
    with_usage.end()
    return Asked(
        choices=fields.integer("n", 1, 1, MOST_CHOICES),
        most_tokens=fields.integer(most_tokens, None, 1, 2**31),
        stops=fields.strings("stop", MOST_STOPS),
        stream=stream,
        with_usage=include,
        top=top,
        options=_sampling(fields),
    )


def _sampling(fields: Fields) -> dict[str, Any]:
    """Options of `generate`. At temperature 0 what limits the choice has nothing to do."""
    temperature = fields.number("temperature", 1.0, 0, 100)
    limits = {
        "top_p": fields.number("top_p", None, 0, 1),
        "top_k": fields.integer("top_k", None, 1, 2**31),
        "min_p": fields.number("min_p", None, 0, 1),
    }
    options: dict[str, Any] = {
        "temperature": temperature,
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0, 100),
        "seed": fields.integer("seed", None, -(2**63), 2**63 - 1),
    }
    if temperature > 0:
        options |= {name: value for name, value in limits.items() if value is not None}
    if fields.flag("ignore_eos"):
        options["stop_tokens"] = ()
    return options


@dataclass
class Piece:
    """The next part of a text.

    Args:
        choice: of which text.
        text: what is certain by now; may be empty.
        tokens: those that came since the last piece.
        reason: why it ends here ("stop", "length"), or None.
    """

    choice: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None


class Texts:
    """The texts of a request.

    Args:
        model: a decoder's.
        prompts: token ids; each gets `asked.choices` texts, which follow each other.
        asked: the settings.

    Raises:
        Refused: naming the setting or prompt that `generate` refuses.
    """

    def __init__(self, model: Running, prompts: list[list[int]], asked: Asked) -> None:
        decoder = model.served.decoder
        assert decoder is not None and model.scheduler is not None
        self.decoder, self.scheduler, self.asked = decoder, model.scheduler, asked
        self.prompt_tokens = sum(map(len, prompts))
        self.written = 0
        self.sequences: list[Sequence] = []
        for prompt in prompts:
            for choice in range(asked.choices):
                self.sequences.append(self._sequence(model, prompt, choice))

    def _sequence(self, model: Running, prompt: list[int], choice: int) -> Sequence:
        options = dict(self.asked.options)
        if options["seed"] is not None:
            options["seed"] += choice
        room = self.decoder.most_tokens - len(prompt)
        most = self.asked.most_tokens
        new = max(1, room) if most is None else most
        try:
            return Sequence(
                self.decoder.model,
                prompt,
                prefixes=model.prefixes,
                passes=self.decoder.writer.passes,
                top=self.asked.top,
                max_new_tokens=new,
                **options,
            )
        except (ValueError, TypeError) as error:
            raise Refused(str(error)) from None

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all texts, as they come. Raises Refused for a failed one."""
        count = len(self.sequences)
        readers = [_Reader(i, self.decoder, self.asked.stops) for i in range(count)]
        events = self.scheduler.submit(self.sequences)
        try:
            while not all(reader.ended for reader in readers):
                choice, event = await events.get()
                if readers[choice].ended:
                    continue
                if isinstance(event, Refused):
                    raise event
                self.written += 1
                piece = readers[choice].read(event)
                if piece.reason is not None:
                    self.scheduler.cancel([self.sequences[choice]])
                if piece.text or piece.reason is not None or self.asked.top is not None:
                    yield piece
        finally:
            self.scheduler.cancel(self.sequences)

    def usage(self) -> dict[str, int]:
        """Tokens read and written, as OpenAI counts them."""
        total = self.prompt_tokens + self.written
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.written,
            "total_tokens": total,
        }


class _Reader:
    """Turns the tokens of one text into pieces."""

    def __init__(self, choice: int, decoder: Decoder, stops: list[str]) -> None:
        self.choice, self.ended = choice, False
        self._print, self._stops = decoder.text.printer(), StopStrings(stops)

    def read(self, token: Token) -> Piece:
        text = "" if token.last == "stop" else self._stops.feed(self._print(token.id))
        reason = "stop" if self._stops.stopped else token.last
        if reason is not None:
            self.ended = True
            text += self._stops.rest()
        return Piece(self.choice, text, [token], reason)
