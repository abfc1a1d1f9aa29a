"""A server process: ports, health, housekeeping, and an orderly end."""

import contextlib
import dataclasses
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from retro_jax.errors import UserError
from retro_jax.retrieval.service.admission import Admission
from retro_jax.retrieval.service.calls import Calls
from retro_jax.retrieval.service.embedding import Embedding
from retro_jax.retrieval.service.front import FrontSource
from retro_jax.retrieval.service.local import LocalSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.security import ServerSecurity
from retro_jax.retrieval.service.wire import SERVICE, Limits

LIVENESS, READINESS = "liveness", "readiness"
_SPARE_THREADS = 8  # to refuse what the queue does not take, and for health
_TICK_SECONDS = 0.5
_Status = health_pb2.HealthCheckResponse


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """How a server listens and what it takes on.

    Attributes:
      host, port: of the service; port 0 takes a free one.
      health_port: of the health protocol alone, in plaintext, for probes that speak no TLS; None: none. The service's
        own port answers it too.
      metrics_port: of Prometheus; None: none.
      metrics_host: where it listens.
      slots: searches at a time.
      queue_requests, queue_queries: what may wait behind them.
      limits: of one request.
      security: TLS and tokens.
      drain_delay: seconds between "not ready" and refusing new requests, so that everybody has heard of it.
      grace: seconds that requests under way may take after that.
      reload_seconds: how often to look for a new database version; 0: only at SIGHUP.
      recall_seconds: how often recall is checked again; 0: only at load.
      log_requests: log every call, not only those that fail.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    health_port: int | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    slots: int = 2
    queue_requests: int = 64
    queue_queries: int = 16_384
    limits: Limits = Limits()  # noqa: RUF009  frozen
    security: ServerSecurity = ServerSecurity()  # noqa: RUF009  frozen
    drain_delay: float = 0.0
    grace: float = 30.0
    reload_seconds: float = 5.0
    recall_seconds: float = 300.0
    log_requests: bool = False


def serve(
    make_source: Callable[[Log, Metrics], LocalSource | FrontSource],
    options: ServerOptions,
    *,
    embedding: Embedding | None = None,
    log: Log | None = None,
    started: Callable[[int], None] = lambda port: None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; SIGHUP loads a new version at once. Call in the main thread.

    It listens from the start, alive and not ready; ready when everything is loaded and verified, or when a front has a
    server for every shard.

    Args:
      make_source: what to answer from.
      options: how.
      embedding: to search by texts and tokens.
      log: where to.
      started: told the service's port.

    Raises:
      UserError: a port in use, an unsafe address, bad certificates, a damaged database.
    """
    options.security.check_address(options.host)
    log = log or Log()
    metrics = Metrics()
    source = make_source(log, metrics)
    admission = Admission(options.slots, requests=options.queue_requests, queries=options.queue_queries)
    metrics.queue_requests.set_function(lambda: admission.waiting)
    metrics.queue_queries.set_function(lambda: admission.waiting_queries)
    metrics.running.set_function(lambda: admission.running)
    calls = Calls(
        source,
        limits=options.limits,
        admission=admission,
        security=options.security,
        log=log,
        metrics=metrics,
        embedding=embedding,
        log_requests=options.log_requests,
    )
    keep = _keep_front if isinstance(source, FrontSource) else _keep_local
    with _Signals() as signals, _Ports(options, calls, metrics) as ports:
        log.event("listening", tls=options.security.identity is not None, **ports.addresses)
        started(ports.port)
        keeper = _Keeper(lambda keeper: keep(source, options, embedding, ports, log, keeper), signals.wake)
        while (number := signals.next()) == signal.SIGHUP:
            keeper.hangup = True
        keeper.end()
        log.event("draining", signal=number, under_way=admission.running)
        calls.draining = True
        ports.drain()
        time.sleep(options.drain_delay)
        ports.stop(options.grace)
    if isinstance(source, FrontSource):
        source.close()
    log.event("stopped")


class _Ports:
    """The service's port, and those of health and metrics; opened on entering, all closed on leaving."""

    def __init__(self, options: ServerOptions, calls: Calls, metrics: Metrics) -> None:
        self._options = options
        self._health = health.HealthServicer()
        self._metrics = metrics
        self._calls = calls
        self._servers: list[grpc.Server] = []
        self._stop_metrics: Callable[[], None] = lambda: None
        self._draining = False
        self._lock = threading.Lock()
        self.port = 0
        self.addresses: dict[str, str] = {}

    def __enter__(self) -> "_Ports":
        options = self._options
        try:
            # A thread for each that runs, each that waits, and some that say no to the rest at once.
            threads = options.slots + options.queue_requests + _SPARE_THREADS
            self._set(LIVENESS, True)
            self.ready(False)
            server = self._server(threads, options.limits.message_bytes)
            server.add_generic_rpc_handlers((self._calls.handler(),))
            self.port = _listen(server, options.host, options.port, options.security.credentials(), "port")
            self.addresses["address"] = _joined(options.host, self.port)
            if options.security.identity:
                self._metrics.certificate_expiry.set_function(options.security.identity.expiry)
            if options.health_port is not None:
                port = _listen(self._server(2, 1 << 16), options.host, options.health_port, None, "health_port")
                self.addresses["health"] = _joined(options.host, port)
            if options.metrics_port is not None:
                port, self._stop_metrics = self._metrics.serve(options.metrics_host, options.metrics_port)
                self.addresses["metrics"] = _joined(options.metrics_host, port)
            for server in self._servers:
                server.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def ready(self, ready: bool) -> None:
        with self._lock:
            for name in ("", READINESS, SERVICE):
                self._set(name, ready and not self._draining)

    def drain(self) -> None:
        """Not ready, for good: a poll or a load that is still under way may end well and call `ready`."""
        self._draining = True
        self.ready(False)

    def stop(self, grace: float) -> None:
        """Takes no new calls, and waits for those under way."""
        for stopped in [server.stop(grace) for server in self._servers]:
            stopped.wait()

    def __exit__(self, *_: object) -> None:
        self.stop(0)
        self._stop_metrics()

    def _server(self, threads: int, message_bytes: int) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="call"),
            options=[
                ("grpc.so_reuseport", 0),  # else two servers share a port without a word
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", message_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # as the clients' keepalive asks for
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.max_metadata_size", 16 << 10),
            ],
            maximum_concurrent_rpcs=2 * threads + 64,  # a message is read by the thread that answers it, not before
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._servers.append(server)
        return server

    def _set(self, name: str, serving: bool) -> None:
        self._health.set(name, _Status.SERVING if serving else _Status.NOT_SERVING)


class _Signals:
    """SIGTERM, SIGINT and SIGHUP, one after the other, for the main thread to wait for."""

    _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __enter__(self) -> "_Signals":
        # Bytes through a socket: an Event could be set by a handler while this very thread holds its lock.
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._before = [signal.signal(number, lambda *_: None) for number in self._NUMBERS]
        self._descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def next(self) -> int:
        """The number of the next signal; 0 after `wake`."""
        return self._read.recv(1)[0]

    def wake(self) -> None:
        self._write.send(b"\0")

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in zip(self._NUMBERS, self._before, strict=True):
            signal.signal(number, handler)
        self._read.close()
        self._write.close()


class _Keeper:
    """A thread that keeps the source in order until `end`; what it raises is raised there.

    Attributes:
      hangup: somebody asked to look for a new version.
    """

    def __init__(self, work: Callable[["_Keeper"], None], failed: Callable[[], None]) -> None:
        """Starts; `failed` is called when the work ends with an exception."""
        self.hangup = False
        self._stop = threading.Event()
        self._error: Exception | None = None

        def run() -> None:
            try:
                work(self)
            except Exception as error:
                self._error = error
                failed()

        self._thread = threading.Thread(target=run, name="keeper", daemon=True)
        self._thread.start()

    def sleep(self, seconds: float) -> bool:
        """Waits; False when the end has come."""
        return not self._stop.wait(seconds)

    def end(self) -> None:
        """Tells the thread to end; one that is loading a database is not waited for."""
        self._stop.set()
        self._thread.join(timeout=_TICK_SECONDS)
        if self._error is not None:
            raise self._error


def _keep_local(
    source: LocalSource, options: ServerOptions, embedding: Embedding | None, ports: _Ports, log: Log, keeper: _Keeper
) -> None:
    """Loads the database, then the next versions of it; checks recall now and then."""
    source.load()
    if embedding is not None:
        embedding.load(source.version(""))
    ports.ready(True)
    log.event("ready")
    last_look = last_check = time.monotonic()
    while keeper.sleep(_TICK_SECONDS):
        now = time.monotonic()
        hangup, keeper.hangup = keeper.hangup, False
        if hangup or (options.reload_seconds and now - last_look >= options.reload_seconds):
            last_look = now
            source.refresh(at_once=hangup)
        if options.recall_seconds and now - last_check >= options.recall_seconds:
            last_check = now
            source.check_recall()


def _keep_front(
    source: FrontSource, options: ServerOptions, embedding: Embedding | None, ports: _Ports, log: Log, keeper: _Keeper
) -> None:
    """Asks the shard servers what they hold, again and again."""
    was_ready = False
    while keeper.sleep(0):
        source.poll()
        if embedding is not None and source.versions():
            embedding.load(source.version(""))
        ready = source.ready
        ports.ready(ready)
        if ready != was_ready:
            log.event("ready" if ready else "not ready")
        was_ready = ready
        keeper.sleep(_TICK_SECONDS)


def _listen(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None, flag: str) -> int:
    """Binds a port; gives its number.

    Raises:
      UserError: it cannot be had: in use, or the host is not of this machine.
    """
    address = _joined(host, port)
    # gRPC says only that binding failed, and tells why in a log of its own.
    with contextlib.closing(_probe(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "port in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            raise UserError(f"cannot listen at {address}: {reason}; give another --host or --{flag}") from None
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise UserError(
            f"cannot listen at {address}: gRPC does not say why; GRPC_VERBOSITY=debug has it log the reason"
        ) from None


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _probe(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
