"""What stands before every route: request ids, the token, errors in the form of each protocol, and
a line in the log, in which no text of a request stands.

Requests that are asked most go straight to their endpoint: the way through Starlette's routes and
handlers would cost as much as a small model's share of a batch.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantize.run.serve.errors import Refused, error_body
from quantize.run.serve.exchange import Gone, answer

LOG = logging.getLogger("quantize.serve")
OPEN = ("/", "/docs", "/v2/health/live", "/v2/health/ready")  # for whoever asks, token or not
REQUEST_ID = "x-request-id"
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
Endpoint = Callable[[Request], Awaitable[Response]]


class Guard:
    """An ASGI app around another.

    Args:
        app: that answers.
        token: what `Authorization: Bearer` must hold; None: nothing.
        direct: by a POST's whole path, the endpoint that answers it and its path parameters.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        direct: Mapping[str, tuple[Endpoint, dict[str, str]]],
    ) -> None:
        self.app, self.token, self.direct = app, token, direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers = time.monotonic(), Headers(scope=scope)
        identity = _identity(headers.get(REQUEST_ID))
        scope["state"] = {**scope.get("state", {}), "request_id": identity}
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((REQUEST_ID.encode(), identity.encode()))
            await send(message)

        try:
            if not self._may(scope["path"], headers):
                refused = Refused("a token is needed: Authorization: Bearer ...", status=401)
                await told(scope["path"], refused)(scope, receive, named)
            elif scope["method"] == "POST" and scope["path"] in self.direct:
                await self._answer(scope, receive, named)
            else:
                await self.app(scope, receive, named)
        except Exception:  # told and logged by `on_failure`
            pass
        finally:
            ms = 1000 * (time.monotonic() - started)
            LOG.info("%s %s %s %d %.1f ms", identity, scope["method"], _shown(scope), status, ms)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """By the endpoint of this very path."""
        endpoint, parameters = self.direct[scope["path"]]
        request = Request({**scope, "app": self.app, "path_params": parameters}, receive)
        try:
            response = await endpoint(request)
        except Refused as refused:
            response = await on_refused(request, refused)
        except Gone as gone:
            response = await on_gone(request, gone)
        except Exception as error:
            response = await on_failure(request, error)
        await response(scope, receive, send)

    def _may(self, path: str, headers: Headers) -> bool:
        if self.token is None or path in OPEN:
            return True
        given = headers.get("authorization", "").encode()
        return hmac.compare_digest(given, b"Bearer " + self.token.encode())


def _identity(given: str | None) -> str:
    """A request's own id where it is fit for a log, else a new one."""
    return given if given and _ID.fullmatch(given) else secrets.token_hex(8)


def _shown(scope: Scope) -> str:
    """A path in a log, whatever bytes it has."""
    return ascii(scope["path"][:200])[1:-1]


def told(path: str, refused: Refused) -> Response:
    """An error as the clients of a path read it."""
    body: dict[str, Any] = {"error": refused.message}
    if not path.startswith("/v2"):
        body = error_body(refused)
    return answer(body, refused.status, refused.headers)


async def on_refused(request: Request, error: Exception) -> Response:
    """The answer to a request that is refused."""
    assert isinstance(error, Refused)
    return told(request.url.path, error)


async def on_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the log has a status of its own for it, that of nginx."""
    return Response(status_code=499)


async def on_failure(request: Request, error: Exception) -> Response:
    """The answer where something went wrong that nobody foresaw; the log has it all."""
    _log(request, error)
    return told(request.url.path, Refused("the server failed; its log has the reason", status=500))


async def on_status(request: Request, error: Exception) -> Response:
    """The answer to an unknown path or method."""
    status = getattr(error, "status_code", 500)
    message = f"{request.method} {request.url.path[:80]}: {getattr(error, 'detail', error)}"
    return told(request.url.path, Refused(message, status=status))


def _log(request: Request, error: BaseException) -> None:
    identity = request.scope["state"]["request_id"]
    LOG.error("%s failed", identity, exc_info=error)
