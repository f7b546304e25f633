"""The Open Inference Protocol, version 2, over HTTP (KServe, Triton): health, metadata, and `infer`
in JSON and with the binary tensor extension.

Left out: BYTES tensors, shared memory, sequences, several versions of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from quantize.run.serve import state
from quantize.run.serve.datatypes import (
    DTYPES,
    NAMES,
    check_shape,
    from_bytes,
    from_json,
    to_bytes,
    to_json,
)
from quantize.run.serve.errors import Refused, short
from quantize.run.serve.exchange import answer, parse_json, read_body, unless_gone
from quantize.run.serve.exchange import to_json as as_json

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY_SIZE, BINARY, ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
EXTENSIONS = ["binary_tensor_data"]
VERSION = "1"  # of every model


async def live(request: Request) -> Response:
    """The process answers."""
    return answer({"live": True})


async def ready(request: Request) -> Response:
    """All models are loaded, and it isn't about to stop."""
    draining = state.of(request).draining
    return answer({"ready": not draining}, 503 if draining else 200)


async def server_metadata(request: Request) -> Response:
    """Name, version and extensions of the server."""
    return answer({"name": "quantize", "version": VERSION, "extensions": EXTENSIONS})


async def model_ready(request: Request) -> Response:
    """The model is loaded."""
    model = _model(request)
    return answer({"name": model.name, "ready": True})


async def model_metadata(request: Request) -> Response:
    """Inputs and outputs of a model: names, datatypes, shapes (-1: any size)."""
    model = _model(request)
    tensors = model.served.tensors
    ports = {"inputs": [], "outputs": []}
    if tensors is not None:
        ports["inputs"] = [port.described() for port in tensors.inputs]
        ports["outputs"] = [port.described() for port in tensors.outputs]
    return answer({"name": model.name, "versions": [VERSION], "platform": "pytorch"} | ports)


async def infer(request: Request) -> Response:
    """Run a model on tensors."""
    serving, model = state.of(request), _model(request)
    with state.Count(serving, model):
        body = await read_body(request, serving.settings.max_body)
        if model.served.tensors is None or model.tensors is None:
            raise Refused(f"{model.name} takes no tensors: it was opened without example inputs")
        content, binary = split(body, request.headers.get(HEADER_LENGTH))
        job = model.served.tensors.job(read_inputs(content, binary))
        wanted = _wanted(content, [port.name for port in model.served.tensors.outputs])
        outputs = (await unless_gone(request, model.tensors.submit([job])))[0]
        return _answer(model.name, content.get("id"), outputs, wanted)


def split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a request, and the bytes behind it. Raises Refused for another length."""
    whole = memoryview(body)
    if header_length is None:
        return parse_json(whole), whole[:0]
    if not header_length.isdigit() or not 0 < int(header_length) <= len(body):
        given = short(header_length)
        raise Refused(f"{HEADER_LENGTH} is {given}; allowed: 1 to {len(body)}, the body's size")
    end = int(header_length)
    return parse_json(whole[:end]), whole[end:]


def read_inputs(content: Mapping[str, Any], binary: memoryview) -> dict[str, Tensor]:
    """The input tensors of a request by name, those in binary from the bytes behind the JSON."""
    given = content.get("inputs")
    if not isinstance(given, list) or not given:
        raise Refused("inputs must be a list of tensors", field="inputs")
    inputs: dict[str, Tensor] = {}
    for entry in given:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise Refused(f"an input is {short(entry)}; it must have a name")
        name = entry["name"]
        if name in inputs:
            raise Refused(f"input {name[:80]!r} stands there twice")
        datatype, shape = entry.get("datatype"), check_shape(name, entry.get("shape"))
        if not isinstance(datatype, str) or datatype not in DTYPES:
            known = ", ".join(DTYPES)
            raise Refused(f"input {name!r}: datatype is {short(datatype)}; allowed: {known}")
        size = parameters(entry).get(BINARY_SIZE)
        if size is None:
            inputs[name] = from_json(name, entry.get("data"), shape, datatype)
            continue
        if type(size) is not int or not 0 <= size <= len(binary):
            raise Refused(
                f"input {name!r}: {BINARY_SIZE} is {short(size)}; {len(binary)} bytes are left"
            )
        inputs[name] = from_bytes(name, binary[:size], shape, datatype)
        binary = binary[size:]
    if len(binary):
        raise Refused(f"{len(binary)} bytes behind the last input")
    return inputs


def parameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request, an input or an output."""
    given = entry.get("parameters", {})
    if not isinstance(given, dict):
        raise Refused("parameters must be an object", field="parameters")
    return given


def _wanted(content: Mapping[str, Any], known: list[str]) -> dict[str, bool]:
    """The outputs that a request asks for, and whether in binary."""
    binary = bool(parameters(content).get(ALL_BINARY, False))
    given = content.get("outputs") or [{"name": name} for name in known]
    if not isinstance(given, list):
        raise Refused("outputs must be a list", field="outputs")
    wanted: dict[str, bool] = {}
    for entry in given:
        name = entry.get("name") if isinstance(entry, dict) else None
        if name not in known:
            raise Refused(f"no output {short(name)}; allowed: {', '.join(known)}")
        wanted[name] = bool(parameters(entry).get(BINARY, binary))
    return wanted


def _answer(
    model: str, identity: object, outputs: Mapping[str, Tensor], wanted: Mapping[str, bool]
) -> Response:
    described, parts = [], []
    for name, binary in wanted.items():
        tensor = outputs[name]
        entry: dict[str, Any] = {
            "name": name,
            "datatype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
        }
        if binary:
            parts.append(to_bytes(tensor))
            entry["parameters"] = {BINARY_SIZE: len(parts[-1])}
        else:
            entry["data"] = to_json(name, tensor)
        described.append(entry)
    content = {"model_name": model, "model_version": VERSION, "outputs": described}
    if isinstance(identity, str):
        content["id"] = identity
    if not parts:
        return answer(content)
    header = as_json(content)
    headers = {HEADER_LENGTH: str(len(header))}
    body = b"".join((header, *parts))
    return Response(body, 200, headers, media_type="application/octet-stream")


def infer_path(name: str) -> str:
    """Where a model is asked to `infer`."""
    return f"/v2/models/{name}/infer"


def _model(request: Request) -> state.Running:
    version = request.path_params.get("version", VERSION)
    if version != VERSION:
        raise Refused(f"no version {version!r}; allowed: {VERSION}", status=404)
    return state.of(request).find(request.path_params["name"])


def _routes_of_a_model(prefix: str) -> list[Route]:
    return [
        Route(f"{prefix}/infer", infer, methods=["POST"]),
        Route(f"{prefix}/ready", model_ready),
        Route(prefix, model_metadata),
    ]


ROUTES = [
    *_routes_of_a_model("/v2/models/{name}"),
    *_routes_of_a_model("/v2/models/{name}/versions/{version}"),
    Route("/v2", server_metadata),
    Route("/v2/health/live", live),
    Route("/v2/health/ready", ready),
]
