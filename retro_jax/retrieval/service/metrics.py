"""What the service tells Prometheus, in a registry of its own."""

import errno
import math
import os
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Counters and gauges of one server, named retro_retrieval_*."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def named(kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options: object):
            return kind(f"retro_retrieval_{name}", text, labels, registry=self.registry, **options)

        self.requests = named(Counter, "requests", "Calls answered.", ("method", "code"))
        self.seconds = named(Histogram, "request_seconds", "From arrival to answer.", ("method",), buckets=_SECONDS)
        self.queries = named(Histogram, "queries", "Queries in a Search.", buckets=_QUERIES)
        self.waited = named(Histogram, "queue_seconds", "Waiting for a slot.", buckets=_SECONDS)
        self.shed = named(Counter, "shed", "Requests refused because the queue was full.")
        self.late = named(Counter, "late", "Requests dropped before the search because their time was over.")
        self.partial = named(Counter, "partial", "Answers without every shard.")
        self.recall = named(Gauge, "recall", "Recall at k = 2 on stored queries, when last checked; NaN: none stored.")
        self.database = named(Gauge, "database_info", "The version that answers.", ("database", "corpus", "embedder"))
        self.loaded_at = named(Gauge, "database_loaded_timestamp_seconds", "When it was loaded.")
        self.reload_failures = named(Counter, "reload_failures", "New versions that could not be loaded.")
        self.certificate_expiry = named(Gauge, "certificate_expiry_timestamp_seconds", "End of the TLS certificate.")
        self.backend_requests = named(Counter, "backend_requests", "Calls to shard servers.", ("backend", "code"))
        self.backend_up = named(Gauge, "backend_up", "1 when a shard server can be asked.", ("backend",))
        self.hedges = named(Counter, "hedges", "Second calls to a replica because the first took long.")
        self.retries = named(Counter, "retries", "Calls repeated because one failed.")
        self.queue_requests = named(Gauge, "queue_requests", "Requests that wait now.")
        self.queue_queries = named(Gauge, "queue_queries", "Queries that wait now.")
        self.running = named(Gauge, "running_requests", "Requests that have a slot now.")

    def loaded(self, version: pb.Version) -> None:
        """A version answers from now on."""
        self.database.clear()
        self.database.labels(version.database, version.corpus, version.embedder).set(1)
        self.loaded_at.set(time.time())
        self.set_recall(version.recall if version.HasField("recall") else None)

    def set_recall(self, recall: float | None) -> None:
        """Recall was measured; None: there are no stored queries."""
        self.recall.set(math.nan if recall is None else recall)

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Answers GET /metrics; returns the port and what ends it.

        Raises:
          UserError: the port is in use.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            reason = "port in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
            raise UserError(f"metrics cannot listen at {host}:{port}: {reason}; give another --metrics_port") from None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop
