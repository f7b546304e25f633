"""Texts to vectors and scores: `/v1/embeddings` as OpenAI has it, `/rerank` as Cohere and Jina."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from quantize.run.serve import state
from quantize.run.serve.encoder import Encoder
from quantize.run.serve.errors import Refused
from quantize.run.serve.exchange import answer, unless_gone
from quantize.run.serve.fields import texts, wrong

Encoded = tuple[list, list]


async def embeddings(request: Request) -> Response:
    """Vectors of texts, each of length 1."""
    serving, fields, running = await state.read(request)
    with state.Count(serving, running) as count:
        encoder = _encoder(running)
        if encoder.scores:
            raise Refused(f"{running.name} gives scores, not vectors: use /rerank")
        form = fields.take("encoding_format", "float")
        if form not in ("float", "base64"):
            raise wrong("encoding_format", form, "float, base64")
        fields.only("dimensions")
        fields.ignore("user")
        given = texts("input", fields.take("input"), serving.settings.max_texts)
        fields.end()
        encoded = [_read(encoder, each) for each in given]
        vectors = await _run(request, running, encoder, encoded)
        read = sum(len(ids) for ids, _ in encoded)
        count.tokens(read, 0)
        data = [
            {"object": "embedding", "index": i, "embedding": _written(vector, form)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": read, "total_tokens": read}
        return answer({"object": "list", "data": data, "model": running.name, "usage": usage})


async def rerank(request: Request) -> Response:
    """Documents by how well they answer a query: a cross-encoder's score, or a cosine."""
    serving, fields, running = await state.read(request)
    with state.Count(serving, running) as count:
        encoder, most = _encoder(running), serving.settings.max_texts
        query = fields.take("query")
        if not isinstance(query, str) or not query:
            raise wrong("query", query, "a text")
        documents = _documents(fields.take("documents"), most)
        top = fields.integer("top_n", len(documents), 1, most)
        with_texts = fields.flag("return_documents")
        fields.end()
        if encoder.scores:
            encoded = [encoder.encode(query, document) for document in documents]
            scores = await _run(request, running, encoder, encoded)
        else:
            encoded = [encoder.encode(text) for text in (query, *documents)]
            vectors = torch.stack(await _run(request, running, encoder, encoded))
            scores = (vectors[1:] @ vectors[0]).tolist()
        _check_finite(scores, "score")
        read = sum(len(ids) for ids, _ in encoded)
        count.tokens(read, 0)
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[:top]
        results: list[dict[str, Any]] = [
            {"index": i, "relevance_score": float(scores[i])} for i in ranked
        ]
        if with_texts:
            for result in results:
                result["document"] = {"text": documents[result["index"]]}
        usage = {"prompt_tokens": read, "total_tokens": read}
        return answer({"model": running.name, "results": results, "usage": usage})


async def _run(
    request: Request, running: state.Running, encoder: Encoder, encoded: list[Encoded]
) -> list[Any]:
    assert running.encoder is not None
    jobs = [encoder.job(each) for each in encoded]
    return await unless_gone(request, running.encoder.submit(jobs))


def _encoder(running: state.Running) -> Encoder:
    if running.served.encoder is None:
        raise Refused(f"{running.name} is no encoder with a tokenizer")
    return running.served.encoder


def _read(encoder: Encoder, text: str | list[int]) -> Encoded:
    return encoder.encode(text) if isinstance(text, str) else encoder.checked(text)


def _documents(given: Any, most: int) -> list[str]:
    """Documents as texts, or as objects with one."""
    if not isinstance(given, list) or not 0 < len(given) <= most:
        raise wrong("documents", given, f"a list of up to {most} texts")
    documents: list[Any] = [each.get("text") if isinstance(each, dict) else each for each in given]
    if not all(isinstance(each, str) for each in documents):
        raise wrong("documents", given, "texts, or objects with a text")
    return documents


def _written(vector: Tensor, form: str) -> str | np.ndarray:
    """A vector as numbers, or as the base64 of little-endian fp32."""
    numbers = vector.numpy()
    _check_finite(numbers, "vector")
    if form == "float":
        return numbers
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def _check_finite(numbers: Any, what: str) -> None:
    """Raises Refused for NaN and infinity, which are no answers and can't stand in JSON."""
    if not np.isfinite(numbers).all():
        raise Refused(f"the model gave a {what} that isn't finite", status=500)


ROUTES = [
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/rerank", rerank, methods=["POST"]),
    Route("/v1/rerank", rerank, methods=["POST"]),
]
