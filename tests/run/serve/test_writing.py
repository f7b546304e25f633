"""OpenAI's API: its own client, and texts that are those of `generate` whatever else is written."""

from __future__ import annotations

import codecs
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from test_oip import running_batcher

import quantize
from quantize.native import build
from quantize.run.serve.sequence import Sequence

PROMPTS = ["a", "hello there", "x" * 40, "long " * 120, "so much " * 80]
DRAW = {"temperature": 0.9, "top_p": 0.9}


def alone(running, name: str, prompt: str, new: int, **options: Any) -> str:
    """The text that `generate` gives by itself, up to its last whole character."""
    model = running.models[name].decoder.model
    ids = torch.tensor([list(prompt.encode())])
    result = quantize.generate(model, ids, max_new_tokens=new, **options)[0, ids.shape[1] :]
    return codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(result.tolist()))


def streamed(client: Any, **request: Any) -> tuple[str, Any]:
    """The text of a stream, and its usage."""
    usage, text = None, ""
    options = {"include_usage": True}
    for chunk in client.completions.create(stream=True, stream_options=options, **request):
        usage = chunk.usage or usage
        text += "".join(choice.text for choice in chunk.choices)
    return text, usage


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["lm", "lm8"])
def test_texts_written_together_are_those_written_alone(client, running, name: str):
    """Greedy and drawn, streamed and whole, of any lengths, joining and leaving as they come."""
    assert running.models[name].decoder.writer.reason is None
    requests: list[dict[str, Any]] = []
    for i in range(16):
        request = {"model": name, "prompt": PROMPTS[i % 5], "max_tokens": 3 + 5 * (i % 4)}
        requests.append(request | ({**DRAW, "seed": i} if i % 2 else {"temperature": 0}))

    def ask(number: int) -> str:
        if number % 3:
            return streamed(client, **requests[number])[0]
        return client.completions.create(**requests[number]).choices[0].text

    before = running.numbers("quantize_generated_tokens_total", name)
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(16)))
    total = sum(request["max_tokens"] for request in requests)
    assert running.numbers("quantize_generated_tokens_total", name) == before + total
    for request, text in zip(requests, texts, strict=True):
        plain = {k: v for k, v in request.items() if k not in ("model", "prompt", "max_tokens")}
        assert text == alone(running, name, request["prompt"], request["max_tokens"], **plain)


def test_choices_have_seeds_of_their_own(client, running):
    """Choice i is drawn with seed + i; the prompt is read once."""
    reply = client.completions.create(model="lm", prompt="abc", max_tokens=9, n=3, seed=5, **DRAW)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for i, choice in enumerate(reply.choices):
        assert choice.text == alone(running, "lm", "abc", 9, seed=5 + i, **DRAW)
    assert reply.usage.prompt_tokens == 3 and reply.usage.completion_tokens == 27


def test_several_prompts_and_token_ids(client, running):
    """As strings or as ids, answered in order."""
    one = client.completions.create(model="lm", prompt=["ab", "cd"], max_tokens=4, temperature=0)
    ids = [list(b"ab"), list(b"cd")]
    other = client.completions.create(model="lm", prompt=ids, max_tokens=4, temperature=0)
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in other.choices]
    assert texts == [alone(running, "lm", text, 4) for text in ("ab", "cd")]


def test_a_stop_string_ends_the_text_before_itself(client, running):
    """Streamed and whole, wherever it begins; other choices go on."""
    text = alone(running, "lm", "hello", 30)
    stop = text[7:9]
    request = {"model": "lm", "prompt": "hello", "max_tokens": 30, "temperature": 0, "stop": [stop]}
    whole = client.completions.create(**request)
    expected = text[: text.index(stop)]
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "stop"
    assert streamed(client, **request)[0] == expected
    assert whole.usage.completion_tokens < 30


def test_log_probs_are_the_model_s(client, running):
    """Of the token that came, and of the most probable ones, under the model's distribution."""
    request = {"model": "lm", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    found = client.completions.create(logprobs=3, **request).choices[0].logprobs
    ids = torch.tensor([list(b"hello")])
    model = running.models["lm"].decoder.model
    _, expected = quantize.generate(model, ids, max_new_tokens=6, log_probs=True)
    torch.testing.assert_close(torch.tensor([found.token_logprobs]), expected)
    for chosen, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3 and max(top.values()) == chosen


def test_a_conversation(client, running):
    """The folder's template makes the prompt; streamed and whole give the same; the end token
    shows no text.
    """
    messages: Any = [{"role": "user", "content": "the cat sat"}]
    decoder = running.models["chat"].decoder
    ids = decoder.encode_chat(messages)
    words = decoder.text.tokenizer
    assert words.decode(ids, skip_special_tokens=False) == "user: the cat sat assistant:"
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
    reply = client.chat.completions.create(model="chat", messages=messages, **options)
    out = quantize.generate(decoder.model, torch.tensor([ids]), max_new_tokens=12, seed=3,
                            temperature=1.0)[0, len(ids) :].tolist()  # fmt: skip
    ended = out[-1] == 2
    expected = words.decode(out[:-1] if ended else out)
    assert reply.choices[0].message.content.split() == expected.split()
    assert reply.choices[0].finish_reason == ("stop" if ended else "length")
    chunks = list(client.chat.completions.create(
        model="chat", messages=messages, stream=True, logprobs=True, top_logprobs=2, **options
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content
    probable = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert len(probable) == len(out) and len(probable[0].content[0].top_logprobs) == 2


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "nothing"}, 404, "no model 'nothing'"),
        ({"model": "net"}, 400, "net writes no text: that takes a decoder"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": 3}, 400, "prompt is 3"),
        ({"prompt": [[]]}, 400, "prompt is []"),
        ({"prompt": [999]}, 400, "token id 999; allowed: 0 to 255"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"max_tokens": 5000}, 400, "pass the limit of 1200"),
        ({"temperature": -1}, 400, "temperature is -1"),
        ({"temperature": True}, 400, "temperature is True"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 99}, 400, "n is 99"),
        ({"stop": [1]}, 400, "stop is [1]"),
        ({"seed": 0.5}, 400, "seed is 0.5"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
        ({"echo": True}, 400, "echo is True"),
        ({"tempratur": 1}, 400, "no field 'tempratur'"),
        ({"stream": "yes"}, 400, "stream is 'yes'"),
    ],
)
def test_wrong_requests_are_named(running, changes: dict, status: int, message: str):
    """With the field, its value and what is allowed, in the form that OpenAI's clients read."""
    body = {"model": "lm", "prompt": "hello", "max_tokens": 2} | changes
    reply = running.client.post("/v1/completions", json=body)
    assert reply.status_code == status and message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages", [[], [{"role": "king", "content": "a"}], [{"role": "user"}], ["hello"]]
)
def test_wrong_conversations_are_named(running, messages: list):
    """An empty one, a role that isn't one, no text."""
    body = {"model": "chat", "messages": messages}
    reply = running.client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400 and "messages" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_its_text(running, stream: bool, monkeypatch):
    """The next step is without it, whether or not the text was streamed.

    Steps take 10 ms, so that no machine is fast enough to end the text before the client goes.
    """
    scheduler = running.server.config.app.app.state.serving.models["lm"].scheduler
    step = scheduler.writer.step

    def slow_step(texts: list[Sequence]) -> list:
        time.sleep(0.01)
        return step(texts)

    monkeypatch.setattr(scheduler.writer, "step", slow_step)
    body = {"model": "lm", "prompt": "go on", "max_tokens": 1000, "stream": stream}
    before = running.numbers("quantize_cancelled_total", "lm")
    if stream:
        with running.client.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())
            assert len(scheduler.active) == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            running.client.post("/v1/completions", json=body, timeout=0.05)
    for _ in range(500):
        cancelled = running.numbers("quantize_cancelled_total", "lm") - before
        if cancelled and not scheduler.active:
            break
        time.sleep(0.01)
    assert not scheduler.active and not scheduler._events and cancelled == 1


def test_a_full_queue_says_when_to_come_again(running):
    """503 with Retry-After, for texts and tensors."""
    state = running.server.config.app.app.state.serving
    scheduler, batcher = state.models["lm"].scheduler, running_batcher(running, "net")
    scheduler.settings = batcher.settings = quantize_settings(max_queue=0)
    x = {"name": "images", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": [0] * 784}
    try:
        for path, body in (
            ("/v1/completions", {"model": "lm", "prompt": "a"}),
            ("/v1/completions", {"model": "lm", "prompt": "a", "stream": True}),
            ("/v2/models/net/infer", {"inputs": [x]}),
        ):
            reply = running.client.post(path, json=body)
            assert reply.status_code == 503 and reply.headers["Retry-After"] == "1"
            assert "requests wait already" in json.dumps(reply.json())
    finally:
        scheduler.settings = batcher.settings = state.settings


def quantize_settings(**changes: Any) -> Any:
    from quantize.run.serve import Settings

    return Settings(**changes)


def test_one_bad_text_ends_alone(running):
    """Logits that aren't finite are an error of the text that has them; the others go on."""
    decoder = running.models["lm"].decoder
    texts = [Sequence(decoder.model, [1, 2, 3], max_new_tokens=4) for _ in range(3)]
    writer = decoder.writer
    writer.step(texts)
    cache: Any = texts[1].cache
    for layer in cache._layers:
        layer.tensors["v"].fill_(torch.nan)
    events = dict(writer.step(texts))
    assert events[texts[1]].status == 500
    assert events[texts[0]].id == events[texts[2]].id
