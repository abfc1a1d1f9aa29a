"""The processes of a run meet at process 0 before JAX starts, and each learns at once when another one goes.

JAX's own start-up ends the process from C++ when something is wrong (a port in use, a host that never comes), without
saying which process is missing; so that is found out here first. The connections of the meeting then stay open: the
operating system closes them when a process dies, and its keep-alive probes notice a host that falls silent.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from retro_jax.errors import TemporaryError, UserError

SILENCE_SECONDS = 20  # a host that does not answer for so long is taken for lost
_ATTEMPT_SECONDS = 5.0
_PAUSE_SECONDS = 0.2
_MAX_LINE = 1 << 20


class Address(NamedTuple):
    """Where process 0 listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class RollCall:
    """The processes of a run, from the moment all have come.

    Attributes:
      hosts: host name of every process, by its index.
    """

    def __init__(self, process: int, hosts: list[str], links: "dict[int, _Link]") -> None:
        self.hosts = tuple(hosts)
        self._process = process
        self._links = links
        self._leaving: set[int] = set()
        self._all_leaving = threading.Event()
        self._stop: Callable[[str, bool], None] = lambda reason, temporary: None

    def name(self, process: int) -> str:
        """`process 1 (its-host)`, for messages."""
        return f"process {process} ({self.hosts[process]})"

    def watch(self, stop: Callable[[str, bool], None]) -> None:
        """Calls `stop(reason, temporary)`, once and from another thread, when a process has failed, and told why, or is
        lost: died or fell silent. Temporary is a loss, and a failure that was told to be."""
        self._stop = stop
        threading.Thread(target=self._listen, name="roll call", daemon=True).start()

    def leave(self) -> None:
        """Returns when all processes have called this; one that goes after that is not missed."""
        if self._process:
            self._tell_all({"leaving": self._process})
        else:
            self._note_leaving(0)
        self._all_leaving.wait()

    def fail(self, reason: str, *, temporary: bool = False) -> None:
        """Tells the other processes why this one is about to end, and whether the same command may work later."""
        self._tell_all({"failed": self._process, "reason": reason, "temporary": temporary})

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, process)
            early = [message for link in self._links.values() for message in link.behind_first]
            if any([self._ends(message) for message in early]):
                return
            while not self._all_leaving.is_set():
                for key, _ in selector.select():
                    messages = self._links[key.data].receive()
                    if messages is None:
                        selector.unregister(key.fileobj)
                        messages = [{"gone": key.data}]
                    if any([self._ends(message) for message in messages]):
                        return

    def _ends(self, message: dict[str, Any]) -> bool:
        """Acts on a message; True when there is nothing more to listen to."""
        if "leaving" in message:
            if self._process:  # process 0 says so when all are leaving
                self._all_leaving.set()
            else:
                self._note_leaving(message["leaving"])
            return self._all_leaving.is_set()
        missing = message.get("gone", message.get("failed"))
        if "gone" in message and missing in self._leaving:
            return False
        if self._process == 0:
            self._tell_all(message)
        if "gone" in message:
            self._stop(f"{self.name(missing)} has stopped or cannot be reached", True)
        else:
            self._stop(f"{self.name(missing)} failed: {message['reason']}", message["temporary"])
        return True

    def _note_leaving(self, process: int) -> None:
        self._leaving.add(process)
        if len(self._leaving) == len(self.hosts):
            self._tell_all({"leaving": 0})
            self._all_leaving.set()

    def _tell_all(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send(message)


def meet(address: Address, process: int, num_processes: int, timeout_seconds: float) -> RollCall:
    """Waits until all processes have come. Process 0 listens at the address's port, which is free again afterwards.

    Raises:
      TemporaryError: process 0 is not to be reached, or a process does not come in time (they are named).
      UserError: the port is in use, two processes have the same index, or were told another number of processes.
    """
    deadline = time.monotonic() + timeout_seconds
    if process:
        return _join(address, process, num_processes, timeout_seconds, deadline)
    return _gather(address, num_processes, timeout_seconds, deadline)


def _gather(address: Address, num_processes: int, timeout_seconds: float, deadline: float) -> RollCall:
    hosts = {0: socket.gethostname()}
    links: dict[int, _Link] = {}
    with contextlib.closing(_listener(address.port)) as listener:
        while True:
            for process in [process for process, link in links.items() if link.is_closed()]:
                del hosts[process], links[process]  # it died while it waited, and may be started again
            if len(hosts) == num_processes:
                break
            listener.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(process) for process in range(num_processes) if process not in hosts)
                reason = (
                    f"of {num_processes} processes, number {missing} did not come to {address} within "
                    f"{timeout_seconds:g} s (there are: {_listed(hosts)}); start it, or look at its output"
                )
                for link in links.values():
                    with contextlib.suppress(OSError):
                        link.send({"error": reason, "temporary": True})
                raise TemporaryError(reason) from None
            link = _Link(connection)
            hello = link.first(_ATTEMPT_SECONDS)
            if hello is None or [type(hello.get(name)) for name in ("process", "of", "host")] != [int, int, str]:
                link.close()  # somebody else's connection
                continue
            process, host = hello["process"], hello["host"]
            reason = _refusal(process, host, hello["of"], num_processes, hosts, links)
            if reason:
                with contextlib.suppress(OSError):
                    link.send({"error": reason, "temporary": False})
                link.close()
                continue
            hosts[process], links[process] = host, link
    names = [hosts[process] for process in range(num_processes)]
    for link in links.values():
        with contextlib.suppress(OSError):  # it is missed as soon as the watch begins
            link.send({"hosts": names})
    return RollCall(0, names, links)


def _refusal(
    process: int, host: str, told: int, num_processes: int, hosts: dict[int, str], links: "dict[int, _Link]"
) -> str | None:
    if told != num_processes:
        return f"process {process} ({host}) was told of {told} processes, process 0 ({hosts[0]}) of {num_processes}"
    if process == 0 or (process in links and not links[process].is_closed()):
        return f"two processes have the number {process}: on {hosts[process]} and on {host}; each needs its own"
    return None


def _join(address: Address, process: int, num_processes: int, timeout_seconds: float, deadline: float) -> RollCall:
    hello = {"process": process, "of": num_processes, "host": socket.gethostname()}
    problem = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = _Link(socket.create_connection(address, timeout=min(left, _ATTEMPT_SECONDS)))
        except OSError as error:
            problem = error.strerror or str(error) or problem
            time.sleep(_PAUSE_SECONDS)
            continue
        with contextlib.suppress(OSError):
            link.send(hello)
            # Process 0 answers when all are there, and says who is missing when its time is over.
            answer = link.first(left + _ATTEMPT_SECONDS)
            if answer and "error" in answer:
                raise (TemporaryError if answer["temporary"] else UserError)(answer["error"])
            if answer and "hosts" in answer:
                return RollCall(process, answer["hosts"], {0: link})
        link.close()
        problem = "the connection was closed by the other side"
        time.sleep(_PAUSE_SECONDS)
    raise TemporaryError(
        f"process {process}: the coordinator, process 0, cannot be reached at {address} within {timeout_seconds:g} s "
        f"({problem}); see that it runs, that the address is its host's, and that no firewall closes the port"
    )


class _Link:
    """A connection that carries one JSON object a line.

    Attributes:
      behind_first: messages that came together with the first.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.behind_first: list[dict[str, Any]] = []
        self._buffer = b""
        self._lock = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", SILENCE_SECONDS // 4),
            ("TCP_KEEPINTVL", SILENCE_SECONDS // 4),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", SILENCE_SECONDS * 1000),
        ):
            if hasattr(socket, option):  # Linux has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def first(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The first message, or None when none comes in time or something else does."""
        self.socket.settimeout(timeout_seconds)
        try:
            while (messages := self.receive()) == []:
                pass
        finally:
            self.socket.settimeout(None)
        if messages is None:
            return None
        message, *self.behind_first = messages
        return message

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, none when a part of one has, None when the other side is gone."""
        try:
            data = self.socket.recv(_MAX_LINE)
        except OSError:
            return None
        if not data or len(self._buffer) + len(data) > _MAX_LINE:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self.socket.close()


def _listener(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} of this host ({error.strerror}); another run may have it: "
            "give another port in --coordinator"
        ) from None


def _listed(hosts: dict[int, str]) -> str:
    return ", ".join(f"{process} on {host}" for process, host in sorted(hosts.items()))
