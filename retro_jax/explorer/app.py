"""The explorer as a web application for one machine: the page, and the JSON it asks for.

It listens on loopback, where any web site that is open in the same browser could reach it. So it answers only to
names of loopback (else a site's own name, pointed at 127.0.0.1, would be one origin with it), refuses what pages of
other origins send, and forbids its own page everything but its own files.
"""

import asyncio
import json
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro_jax.errors import UserError
from retro_jax.explorer.explorer import Explorer
from retro_jax.explorer.page import ASSETS, PAGE, read, render
from retro_jax.explorer.session import Session
from retro_jax.explorer.turns import BusyError, Turn, Turns

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_MOST_BYTES = 1 << 18
_SECONDS_TO_SEND = 10
_LONGEST_MESSAGE = 400
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def create_app(explorer: Explorer, turns: Turns, *, start: Session) -> ASGIApp:
    """The application.

    Args:
      explorer: what is shown; used on the thread of `turns` alone.
      turns: of the requests that need the model.
      start: what the page begins with.
    """

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE)

    async def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            raise HTTPException(404, f"there is no {name}")
        return Response(read(name), media_type=ASSETS[name])

    async def about(request: Request) -> Response:
        limits = explorer.limits
        return JSONResponse(
            {
                "run": explorer.describe(),
                "limits": {"prompt_tokens": limits.prompt_tokens, "new_tokens": limits.new_tokens},
                "session": start.to_json(),
            }
        )

    async def generate(request: Request) -> Response:
        session = await _session(request)
        return _Lines(turns.begin(explorer.generate(session)))

    async def view(request: Request) -> Response:
        return JSONResponse(await alone(explorer.view, await _session(request)))

    async def export(request: Request) -> Response:
        return HTMLResponse(render(await alone(explorer.view, await _session(request))))

    async def alone(work: Callable[[Session], Any], session: Session) -> Any:
        def pieces() -> Iterator[Any]:
            yield work(session)

        turn = turns.begin(pieces())
        try:
            return await anext(turn)
        finally:
            turn.close()

    routes = [
        Route("/", page),
        Route("/api/about", about),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/view", view, methods=["POST"]),
        Route("/api/page", export, methods=["POST"]),
        Route("/{name}", asset),
    ]
    handlers = {
        HTTPException: lambda _, error: _refusal(error.status_code, error.detail, error.headers),
        UserError: lambda _, error: _refusal(400, str(error)),
        OSError: lambda _, error: _refusal(502, f"the neighbours could not be had: {error}"),
        BusyError: lambda *_: _refusal(429, _BUSY, {"retry-after": "2"}),
        Exception: lambda _, error: _refusal(500, _DEFECT),
    }
    return _Guard(Starlette(routes=routes, exception_handlers=handlers))


_BUSY = "the model is busy with other requests; try again in a moment"
_DEFECT = "something is wrong with the explorer itself; its terminal says what"


class _Lines(StreamingResponse):
    """A JSON object a line, as the turn gives them. A client that goes away ends the turn."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(self._lines(turn), media_type="application/x-ndjson")
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.close()

    @staticmethod
    async def _lines(turn: Turn):
        try:
            async for event in turn:
                yield _line(event)
        except (UserError, OSError) as error:
            yield _line({"error": _sendable(str(error))})
        except Exception:  # the status is sent already
            traceback.print_exc()
            yield _line({"error": _DEFECT})


class _Guard:
    """Refuses other hosts and origins, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        request = Request(scope)
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if _name(host) not in LOOPBACK:
            refusal = _refusal(403, f"this server answers only to {', '.join(LOOPBACK)}")
            await refusal(scope, receive, with_headers)
        elif origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            await _refusal(403, "pages of other origins may not use this server")(scope, receive, with_headers)
        else:
            await self._app(scope, receive, with_headers)


async def _session(request: Request) -> Session:
    """The session in the body of a request.

    Raises:
      HTTPException: it is no JSON, too large, or does not come.
      UserError: it is no session.
    """
    # A form of another site can send no JSON, even where a browser sends no origin.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected application/json")
    body = b""
    try:
        async with asyncio.timeout(_SECONDS_TO_SEND):
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BYTES:
                    raise HTTPException(413, f"the session has more than {_MOST_BYTES:,} bytes; shorten the prompt")
    except ClientDisconnect:
        raise HTTPException(400, "the session did not come whole") from None
    except TimeoutError:
        raise HTTPException(408, f"the session did not come within {_SECONDS_TO_SEND} s") from None
    try:
        return Session.parse(json.loads(body))
    except (ValueError, RecursionError):
        raise HTTPException(400, "the session is no JSON") from None


def _name(host: str) -> str:
    """Host without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _refusal(status: int, message: str, headers: Any = None) -> Response:
    return JSONResponse({"error": _sendable(message)}, status, headers=headers)


def _sendable(message: str) -> str:
    """A message that may quote what was sent: no longer than a person reads, and valid UTF-8."""
    message = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "…"
    return message.encode("utf-8", "replace").decode()


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"
