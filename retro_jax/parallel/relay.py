"""Stands between JAX and its coordinator, so that JAX does not see the coordinator's end.

When the connection to its coordinator closes, JAX ends the process from C++ with a stack dump, before anything in
Python can say why. The relay keeps JAX's side open; the roll call notices the end and says which process is gone.

It is a process of its own, this file run as a program: JAX waits for its coordinator while it holds Python's global
lock, so a thread would not do. It needs nothing but the standard library, and ends with the process that started it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

LOOPBACK = "127.0.0.1"
_PAUSE_SECONDS = 0.1
_BUFFER_BYTES = 1 << 16


class Relay:
    """Forwards connections from a port of this host's loopback, until this process ends or closes it.

    Attributes:
      address: host:port to give to JAX instead of the coordinator's.
    """

    def __init__(self, host: str, port: int, timeout_seconds: float) -> None:
        """Starts it.

        Args:
          host, port: of the coordinator.
          timeout_seconds: how long to try to connect, for each connection.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, host, str(port), str(timeout_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = f"{LOOPBACK}:{self._process.stdout.readline().strip()}"
        self._process.stdout.close()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _serve(target: tuple[str, int], timeout_seconds: float) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # sent to all processes of a job, or of a terminal
        signal.signal(number, signal.SIG_IGN)
    listener = socket.create_server((LOOPBACK, 0))
    threading.Thread(target=_accept, args=(listener, target, timeout_seconds), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()  # nothing comes; it ends when the process that started this one does
    os._exit(0)


def _accept(listener: socket.socket, target: tuple[str, int], timeout_seconds: float) -> None:
    while True:
        near, _ = listener.accept()
        threading.Thread(target=_forward, args=(near, target, timeout_seconds), daemon=True).start()


def _forward(near: socket.socket, target: tuple[str, int], timeout_seconds: float) -> None:
    far = _connect(target, timeout_seconds)
    if far is None:
        near.close()
        return
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_copy, args=(far, near), daemon=True).start()
    _copy(near, far)
    for end in (far, near):  # only here: the far side's end is not passed on
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes the other thread, which a close would not
        end.close()


def _connect(target: tuple[str, int], timeout_seconds: float) -> socket.socket | None:
    deadline = time.monotonic() + timeout_seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(target, timeout=left)
            connection.settimeout(None)
            return connection
        except OSError:
            time.sleep(_PAUSE_SECONDS)
    return None


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_BUFFER_BYTES):
            target.sendall(data)


if __name__ == "__main__":
    _serve((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))
