"""The Open Inference Protocol: Triton's own client, JSON by hand, and what is refused."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from helpers import assert_close, randn
from tritonclient.utils import InferenceServerException


@pytest.fixture
def client(running) -> Any:
    return triton.InferenceServerClient(running.address)


def image(rows: int = 1) -> torch.Tensor:
    return randn(rows, 1, 28, 28)


def entry(x: torch.Tensor, **changes: Any) -> dict[str, Any]:
    """An input of `net` in JSON."""
    plain = {"name": "images", "datatype": "FP32", "shape": list(x.shape)}
    return {**plain, "data": x.flatten().tolist(), **changes}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_triton_gets_the_model_s_numbers(client, running, binary_in: bool, binary_out: bool):
    """In JSON and in binary, each way."""
    x = image(3)
    given = triton.InferInput("images", list(x.shape), "FP32")
    given.set_data_from_numpy(x.numpy(), binary_data=binary_in)
    wanted = triton.InferRequestedOutput("output", binary_data=binary_out)
    result = client.infer("net", [given], outputs=[wanted], request_id="seven")
    expected = running.models["net"].tensors({"images": x})["output"]
    assert_close(torch.from_numpy(result.as_numpy("output").copy()), expected)
    assert result.get_response()["id"] == "seven"


def test_triton_finds_what_is_served(client):
    """Health and metadata."""
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("net")
    assert not client.is_model_ready("nothing")
    about = client.get_model_metadata("net", model_version="1")
    assert about["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 28, 28]}]
    assert about["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 10]}]
    ids = client.get_model_metadata("bert")["inputs"]
    assert ids[0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]


def test_ids_of_several_inputs(client, running):
    """Inputs may come in any order; outputs that aren't asked for don't come."""
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    given = []
    for name, tensor in (("attention_mask", mask), ("input_ids", ids)):
        given.append(triton.InferInput(name, list(tensor.shape), "INT64"))
        given[-1].set_data_from_numpy(tensor.numpy())
    wanted = [triton.InferRequestedOutput("last_hidden_state")]
    result = client.infer("bert", given, outputs=wanted)
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = running.models["bert"].tensors(inputs)["last_hidden_state"]
    assert_close(torch.from_numpy(result.as_numpy("last_hidden_state").copy()), expected)
    assert result.as_numpy("pooler_output") is None


def test_rows_in_a_batch_are_what_they_are_alone(running):
    """int8 layers give the same bits beside other rows; requests do share calls, as a call takes
    10 ms on any machine.
    """
    model, rows = running.models["mlp8"].tensors, [randn(1, 64, seed=i) for i in range(24)]
    together = threading.Barrier(len(rows))
    sizes: list[int] = []
    plain_run, batcher = model.run, running_batcher(running, "mlp8")

    def run(jobs):
        sizes.append(len(jobs))
        time.sleep(0.01)
        return plain_run(jobs)

    def ask(x: torch.Tensor) -> list[float]:
        together.wait()
        body = {"inputs": [entry(x, name="input")]}
        return running.client.post("/v2/models/mlp8/infer", json=body).json()["outputs"][0]["data"]

    batcher.run = run
    try:
        with ThreadPoolExecutor(len(rows)) as pool:
            answers = list(pool.map(ask, rows))
    finally:
        batcher.run = plain_run
    for x, numbers in zip(rows, answers, strict=True):
        expected = model({"input": x})["output"].flatten()
        assert torch.equal(torch.tensor(numbers), expected)
    assert sum(sizes) == len(rows) and len(sizes) < len(rows)


def running_batcher(running, name: str) -> Any:
    """The queue of a model in the server's own process."""
    return running.server.config.app.app.state.serving.models[name].tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "pictures"}, "no input 'pictures'; allowed: images"),
        ({"datatype": "FP64"}, "datatype is FP64; allowed: FP32"),
        ({"datatype": "BYTES"}, "datatype is 'BYTES'; allowed"),
        ({"datatype": ["FP32"]}, "datatype is ['FP32']; allowed"),
        ({"shape": [1, 28, 28]}, "shape is [1, 28, 28]; allowed: [-1, 1, 28, 28]"),
        ({"shape": [1, 1, 28, 29]}, "784 numbers for shape [1, 1, 28, 29]"),
        ({"shape": [0, 1, 28, 28]}, "allowed: 1 to 8 sizes"),
        ({"shape": [10**9, 10**9, 1, 1]}, "784 numbers"),
        ({"shape": "all"}, "shape is 'all'"),
        ({"data": ["a"] * 784}, "isn't a list of FP32 numbers"),
        ({"data": [1e39] * 784}, "NaN or infinity"),
        ({"data": [[1], [2, 3]]}, "isn't a list of FP32 numbers"),
        ({"data": None}, "isn't a list of FP32 numbers"),
        ({"data": [2**63] * 784, "datatype": "INT64"}, "isn't a list of INT64 numbers"),
        ({"parameters": {"binary_data_size": 9}}, "binary_data_size is 9; 0 bytes are left"),
        ({"parameters": 3}, "parameters must be an object"),
    ],
)
def test_wrong_inputs_are_named(running, changes: dict, message: str):
    """Each mistake is a 400 that says what is wrong and what is allowed."""
    body = {"inputs": [entry(image(), **changes)]}
    reply = running.client.post("/v2/models/net/infer", json=body)
    assert reply.status_code == 400 and message in reply.json()["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "isn't JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"id": "\\ud800"}', "not UTF-8"),
        (b"[" * 100_000, "isn't JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"inputs": NaN}', "NaN is no JSON number"),
        (b'{"inputs": [], "inputs": []}', "a key stands there twice"),
        (b'{"inputs": []}', "inputs must be a list"),
        (b'{"inputs": [1]}', "it must have a name"),
    ],
)
def test_garbage_is_a_mistake(running, body: bytes, message: str):
    """Whatever the bytes are."""
    reply = running.client.post("/v2/models/net/infer", content=body)
    assert reply.status_code == 400 and message in reply.json()["error"]


def test_binary_lengths_are_checked(client, running):
    """Too few bytes, too many, a header that is longer than the body."""
    given = triton.InferInput("images", [1, 1, 28, 28], "FP32")
    given.set_data_from_numpy(image().numpy())
    body, length = triton.InferenceServerClient.generate_request_body([given])
    url, header = "/v2/models/net/infer", "Inference-Header-Content-Length"
    for content, size, message in (
        (body[:-4], length, "bytes are left"),
        (body + b"1234", length, "4 bytes behind the last input"),
        (body, 10**9, f"allowed: 1 to {len(body)}"),
        (body, 0, f"allowed: 1 to {len(body)}"),
    ):
        reply = running.client.post(url, content=content, headers={header: str(size)})
        assert reply.status_code == 400 and message in reply.json()["error"]


def test_nan_is_refused_in_binary_too(client):
    """A model would answer it with NaN for every row that it touches."""
    given = triton.InferInput("images", [1, 1, 28, 28], "FP32")
    given.set_data_from_numpy(np.full((1, 1, 28, 28), np.nan, np.float32))
    with pytest.raises(InferenceServerException, match="holds NaN"):
        client.infer("net", [given])


def test_ids_beyond_the_vocabulary_are_refused(running):
    """By name, before the model sees them."""
    ids = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 256]}
    reply = running.client.post("/v2/models/lm/infer", json={"inputs": [ids]})
    assert reply.status_code == 400 and "id 256; allowed: 0 to 255" in reply.json()["error"]


def test_limits_and_unknown_names(running):
    """A body over the limit, a request over the budget of tokens, an unknown model or version."""
    post, get = running.client.post, running.client.get
    url = "/v2/models/net/infer"
    assert post(url, content=b" " * (1 << 20) + b"{}").status_code == 413
    x = torch.zeros(65, 1, 28, 28)
    reply = post(url, json={"inputs": [entry(x, data=[0] * x.numel())]})
    assert reply.status_code == 400 and "allowed: 4096 tokens" in reply.json()["error"]
    missing = post("/v2/models/nothing/infer", json={})
    assert missing.status_code == 404 and "no model 'nothing'" in missing.json()["error"]
    assert get("/v2/models/net/versions/2").status_code == 404
    assert get(url).status_code == 405
