"""Vectors and scores: OpenAI's client against the model called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from served_models import WORDS

from quantize.run.serve.embeddings import _written
from quantize.run.serve.errors import Refused

TEXTS = ["the cat sat", "a dog", "the dog ran on the mat"]


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([[WORDS.index(word) for word in text.split()]])


def by_hand(running, text: str) -> torch.Tensor:
    """The mean over the tokens, of length 1."""
    with torch.no_grad():
        hidden = running.models["bert"].encoder.model(ids_of(text)).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_vectors_of_texts(running, client, form: str):
    """One text, several, token ids; each as it is alone, whatever the padding."""
    given: Any = {"float": {"encoding_format": "float"}, "base64": {}}[form]  # its default
    reply = client.embeddings.create(model="bert", input=TEXTS, **given)
    for text, entry in zip(TEXTS, reply.data, strict=True):
        assert_close(torch.tensor(entry.embedding), by_hand(running, text))
    assert reply.usage.prompt_tokens == 11
    ids = ids_of(TEXTS[0])[0].tolist()
    one = client.embeddings.create(model="bert", input=ids, **given).data[0].embedding
    assert_close(torch.tensor(one), by_hand(running, TEXTS[0]))


@pytest.mark.parametrize("form", ["float", "base64"])
def test_a_vector_that_is_not_finite_is_no_answer(form: str):
    """In JSON it would read null."""
    with pytest.raises(Refused, match="a vector that isn't finite"):
        _written(torch.tensor([1.0, torch.nan]), form)


def test_documents_by_cosine(running):
    """With vectors, the score of a document is its cosine to the query."""
    body = {"model": "bert", "query": "the cat", "documents": TEXTS, "return_documents": True}
    results = running.client.post("/rerank", json=body).json()["results"]
    query = by_hand(running, "the cat")
    scores = torch.stack([by_hand(running, text) @ query for text in TEXTS])
    order = scores.argsort(descending=True).tolist()
    assert [result["index"] for result in results] == order
    assert [result["document"]["text"] for result in results] == [TEXTS[i] for i in order]
    found = torch.tensor([result["relevance_score"] for result in results])
    assert_close(found, scores[order])


def test_documents_by_a_classifier(running):
    """A cross-encoder reads query and document together; the score is the sigmoid of its logit."""
    body = {"model": "cross", "query": "the cat", "documents": TEXTS, "top_n": 2}
    results = running.client.post("/v1/rerank", json=body).json()["results"]
    model, scores = running.models["cross"].encoder.model, []
    for text in TEXTS:
        ids = torch.cat((ids_of("the cat"), ids_of(text)), 1)
        types = torch.tensor([[0, 0] + [1] * len(text.split())])
        with torch.no_grad():
            scores.append(float(model(ids, token_type_ids=types).logits.sigmoid()))
    best = sorted(range(3), key=lambda i: -scores[i])[:2]
    assert [result["index"] for result in results] == best
    found = torch.tensor([result["relevance_score"] for result in results])
    assert_close(found, torch.tensor([scores[i] for i in best]))


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/embeddings", {"model": "bert", "input": []}, "input is []"),
        ("/v1/embeddings", {"model": "bert", "input": [""]}, "a text has 0 tokens"),
        ("/v1/embeddings", {"model": "bert", "input": "cat " * 600}, "a text has 600 tokens"),
        ("/v1/embeddings", {"model": "bert", "input": "a" * 50_000}, "a text has 50000 characters"),
        ("/v1/completions", {"model": "lm", "prompt": "a" * 500_000}, "a text has 500000 char"),
        ("/v1/embeddings", {"model": "bert", "input": [99]}, "a token id outside 0 to 12"),
        ("/v1/embeddings", {"model": "bert", "input": [2**63]}, "a list of token ids"),
        ("/v1/embeddings", {"model": "bert", "input": "a", "dimensions": 5}, "dimensions is 5"),
        ("/v1/embeddings", {"model": "cross", "input": "a"}, "use /rerank"),
        ("/v1/embeddings", {"model": "lm", "input": "a"}, "no encoder"),
        ("/rerank", {"model": "bert", "query": "a", "documents": [3]}, "documents is [3]"),
        ("/rerank", {"model": "bert", "documents": ["a"]}, "query is None"),
    ],
)
def test_wrong_requests_are_named(running, path: str, body: dict, message: str):
    """With the field or the model, and what is allowed."""
    reply = running.client.post(path, json=body)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]
