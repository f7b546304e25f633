"""The server as one ASGI app: `app(models)`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from torch import nn

from quantize.run.serve import embeddings, oip, openai
from quantize.run.serve.errors import Refused
from quantize.run.serve.exchange import Gone
from quantize.run.serve.guard import Guard, on_failure, on_gone, on_refused, on_status
from quantize.run.serve.keeping import Keeper
from quantize.run.serve.metrics import Metrics
from quantize.run.serve.served import Served, default_name, open_served, serve_model
from quantize.run.serve.settings import Settings
from quantize.run.serve.state import State, of

PAGE = Path(__file__).with_name("page.html")
Given = nn.Module | Served | str | os.PathLike[str]
Models = Mapping[str, Given] | Iterable[Given]


def app(
    models: Models,
    settings: Settings | None = None,
    *,
    metrics: Metrics | None = None,
    keeper: Keeper | None = None,
) -> Guard:
    """An ASGI app that serves models; any ASGI server runs it, one process of it per app.

    Args:
        models: by name, or one after another: models in eval mode on the CPU, with an
            `example_inputs()` of their own; paths, each served under its last part if it has no
            name; what `open_served` and `serve_model` give, which know tokenizers and example
            inputs, and their names.
        settings: the limits; None: the defaults.
        metrics: the numbers, where several processes share them; None: its own.
        keeper: hands connections to a parent process; None: there is none.

    Returns:
        The app.

    Raises:
        CheckpointError: a path that can't be read.
        TypeError: something else among the models, or a model without a name.
        ValueError: no model, two of one name, or one that can't be served.
    """
    settings = settings or Settings()
    served = _all_served(models)
    names = [one.name for one in served]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"models are {names}; allowed: at least one, each with a name of its own")

    @asynccontextmanager
    async def lifespan(starlette: Starlette) -> AsyncIterator[None]:
        state = State(served, settings, metrics or Metrics(names), keeper or Keeper())
        starlette.state.serving = state
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # in the event loop; see `batching`
        yield
        torch.set_num_threads(before)
        state.draining = True
        state.compute.shutdown()

    starlette = Starlette(routes=ROUTES, lifespan=lifespan, exception_handlers=HANDLERS)
    direct = {oip.infer_path(name): (oip.infer, {"name": name}) for name in names}
    direct["/v1/embeddings"] = embeddings.embeddings, {}
    return Guard(starlette, settings.token, direct)


def _all_served(models: Any) -> list[Served]:
    if isinstance(models, Mapping):
        return [_served(given, name) for name, given in models.items()]
    if isinstance(models, (str, os.PathLike, nn.Module)):
        raise TypeError(f"models is a {type(models).__name__}; give a list, or a dict by name")
    return [_served(given, None) for given in models]


def _served(given: Given, name: str | None) -> Served:
    """One model as it is served, under a name if there is one."""
    if isinstance(given, Served):
        return replace(given, name=name or given.name)
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        return open_served(path, name or default_name(path))
    if isinstance(given, nn.Module) and name is not None:
        return serve_model(given, name)
    raise TypeError(
        f"among the models is a {type(given).__name__} without a name; give paths, what "
        f"open_served gives, or a dict from name to model"
    )


async def page(request: Request) -> Response:
    """A page to try the models."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    form = "text/plain; version=0.0.4; charset=utf-8"
    return PlainTextResponse(of(request).metrics.text(), media_type=form)


async def docs(request: Request) -> Response:
    """All routes."""
    lines = []
    for route in ROUTES:
        methods = ", ".join(sorted((route.methods or set()) - {"HEAD"}))
        about = (route.endpoint.__doc__ or "").strip()
        lines.append(f"<tr><td>{methods}<td><code>{route.path}</code><td>{about}")
    rows = "\n".join(lines)
    return HTMLResponse(
        f"<!doctype html><meta charset=utf-8><title>quantize serve</title><table>{rows}</table>"
    )


HANDLERS = {Refused: on_refused, Gone: on_gone, HTTPException: on_status, Exception: on_failure}
ROUTES = [  # the first that fits is taken: those that are asked most come first
    *oip.ROUTES,
    *openai.ROUTES,
    *embeddings.ROUTES,
    Route("/", page),
    Route("/docs", docs),
    Route("/metrics", metrics),
]
