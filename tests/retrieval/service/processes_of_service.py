"""Server processes of a test: started together, asked when they are ready, ended whatever happens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from small_run import ROOT

HERE = Path(__file__).resolve().parent


class Server:
    """A process that serves; what it logs is collected."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self.lines.append("")
            self._changed.notify_all()

    def event(self, name: str, timeout: float = 60) -> dict:
        """The first log line of this event; waits for it."""

        def found() -> dict | None:
            events = [json.loads(line) for line in self.lines if line.startswith("{")]
            return next((event for event in events if event["event"] == name), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or (self.lines and self.lines[-1] == ""), timeout)
            event = found()
        assert event is not None, f"no {name!r} in\n{''.join(self.lines)}"
        return event

    @property
    def address(self) -> str:
        return self.event("listening")["address"]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, timeout: float = 30) -> int:
        """SIGTERM, then its exit status."""
        self.signal(signal.SIGTERM)
        status = self.process.wait(timeout)
        self._reader.join(5)
        return status


def standin(directory: Path, shards: str, **options: object) -> Server:
    flags = [f"--{name}={value}" for name, value in options.items()]
    return Server(str(HERE / "standin.py"), str(directory), shards, *flags)


def program(*flags: str) -> Server:
    """launch/serve_retrieval.py at a free port."""
    return Server(str(ROOT / "launch" / "serve_retrieval.py"), "--port=0", *flags)


def front(*backends: Server, flags: tuple[str, ...] = ()) -> Server:
    return program(f"--backends={','.join(backend.address for backend in backends)}", *flags)


@contextlib.contextmanager
def running(*servers: Server):
    """Ends them, and checks that none has met a defect."""
    try:
        yield servers
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            server._reader.join(5)
            for pipe in (server.process.stdout, server.process.stderr):
                pipe.close()
    for server in servers:
        text = "".join(server.lines)
        assert '"defect"' not in text and "Traceback" not in text, text


def health(address: str, service: str = "readiness", channel: grpc.Channel | None = None) -> str:
    """The name of a service's status."""
    with contextlib.ExitStack() as stack:
        if channel is None:
            channel = stack.enter_context(grpc.insecure_channel(address))
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10, wait_for_ready=True)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def wait_ready(*servers: Server, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    for server in servers:
        with grpc.insecure_channel(server.address) as channel:
            while health(server.address, channel=channel) != "SERVING":
                assert time.monotonic() < end and server.process.poll() is None, "".join(server.lines)
                time.sleep(0.02)
