"""What a server may be told, and what one request may ask of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits of a server; each is refused by name where a request passes it.

    Args:
        max_batch_tokens: what one call of a model may hold, padding included: rows x tokens, for
            inputs without tokens ROW_TOKENS a row.
        max_queue: requests that wait for one model; the next one gets 503.
        max_body: bytes of a request.
        max_texts: texts, documents or choices of one request.
        workers: processes that share the cores.
        threads: of torch, for the calls of the models; None: a batch shares the cores with the
            workers that computed lately, texts get an equal part of them.
        most_active: texts that are written at the same time; others wait.
        prefix_bytes: what is kept of the prompts read last, to be read again for nothing.
        token: what `Authorization: Bearer` must hold; None: whoever reaches the port is served.
    """

    max_batch_tokens: int = 4096
    max_queue: int = 256
    max_body: int = 32 << 20
    max_texts: int = 256
    workers: int = 1
    threads: int | None = None
    most_active: int = 16
    prefix_bytes: int = 256 << 20
    token: str | None = None


ROW_TOKENS = 64  # what a row without tokens (an image, a vector) counts as
