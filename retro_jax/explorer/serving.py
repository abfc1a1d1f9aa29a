"""The explorer's web server: one process, on loopback, until it is told to end."""

import errno
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from retro_jax.errors import UserError

_HOST = "127.0.0.1"
_CONNECTIONS = 64  # beyond them 503
_GRACE = 10  # seconds that requests in progress have to end


def serve(app: ASGIApp, listener: socket.socket, ending: Callable[[], None]) -> None:
    """Serves until SIGTERM (then the process exits with 0) or SIGINT (KeyboardInterrupt). Call in the main thread.

    Args:
      app: the application.
      listener: of `listen`.
      ending: called in a signal handler when the end has come, so that streams end; others have a grace to.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands the signal on when it has ended
    server = create_server(app)
    told = server.handle_exit

    def handle_exit(number: int, frame: FrameType | None) -> None:
        ending()
        told(number, frame)

    server.handle_exit = handle_exit
    server.run(sockets=[listener])


def address(listener: socket.socket) -> str:
    """Of the page."""
    return f"http://{_HOST}:{listener.getsockname()[1]}/"


def create_server(app: ASGIApp) -> uvicorn.Server:
    """The server of an application, to be run with the sockets of `listen`."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
    )
    return uvicorn.Server(config)


def listen(port: int) -> socket.socket:
    """A socket that listens on loopback; connections wait from now on. Port 0 takes a free one.

    Raises:
      UserError: the port cannot be had.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
    except OSError as error:
        listener.close()
        reason = {errno.EADDRINUSE: "is in use", errno.EACCES: "may not be used"}.get(error.errno, str(error))
        raise UserError(f"port {port} {reason}; give another one with --port, or 0 for any") from None
    listener.listen()
    return listener
