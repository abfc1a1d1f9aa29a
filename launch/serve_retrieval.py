"""Serves a retrieval database over gRPC: as a shard server, or as a front that asks shard servers.

    python launch/serve_retrieval.py --database=DB                                  # all of it, at 127.0.0.1:50051
    python launch/serve_retrieval.py --database=DB --shards=0/2 --port=50061        # half of its index shards
    python launch/serve_retrieval.py --backends=127.0.0.1:50061,127.0.0.1:50062     # a front, for clients

SIGTERM drains and ends; SIGHUP loads a new version of the database at once. docs/retrieval-service.md tells the rest.
"""

import os
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.retrieval.segments import signature
from retro_jax.retrieval.service.embedding import Embedding
from retro_jax.retrieval.service.front import FrontSource
from retro_jax.retrieval.service.holding import ChosenShards, open_database
from retro_jax.retrieval.service.local import LocalSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.replicas import Patience
from retro_jax.retrieval.service.security import ClientSecurity, Identity, ServerSecurity, read_tokens
from retro_jax.retrieval.service.server import ServerOptions, serve
from retro_jax.retrieval.service.wire import Limits

_DATABASE = flags.DEFINE_string("database", None, "Database directory, or a link to one, for a shard server.")
_SHARDS = flags.DEFINE_string("shards", None, "Its index shards to serve: 0,2,5, or 0/2 for every second from 0.")
_BACKENDS = flags.DEFINE_list("backends", None, "HOST:PORT of shard servers, for a front.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "The database's embedder, to search by texts and tokens.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Where to listen; elsewhere than on loopback TLS is needed.")
_PORT = flags.DEFINE_integer("port", 50051, "Port; 0 takes a free one, which the log names.", 0, 65535)
_HEALTH_PORT = flags.DEFINE_integer("health_port", None, "Port of the health protocol in plaintext.", 0, 65535)
_METRICS_PORT = flags.DEFINE_integer("metrics_port", None, "Port of Prometheus metrics.", 0, 65535)
_METRICS_HOST = flags.DEFINE_string("metrics_host", "127.0.0.1", "Where the metrics listen.")
_CERTIFICATE = flags.DEFINE_string("tls_certificate", None, "PEM certificate chain of this server.")
_KEY = flags.DEFINE_string("tls_key", None, "PEM private key of it.")
_CLIENT_CA = flags.DEFINE_string("tls_client_ca", None, "PEM authorities whose clients are let in (mutual TLS).")
_TOKENS = flags.DEFINE_string("token_file", None, "Bearer tokens, one a line; a call must come with one.")
_PLAINTEXT = flags.DEFINE_bool("allow_plaintext", False, "Listen, and send tokens, without TLS off loopback.")
_BACKEND_CA = flags.DEFINE_string("backend_ca", None, "PEM authorities of the shard servers; plaintext without.")
_BACKEND_TOKENS = flags.DEFINE_string("backend_token_file", None, "Bearer token to show to the shard servers.")
_SLOTS = flags.DEFINE_integer("slots", None, "Searches at a time; cores of this machine, or 64 in a front.", 1)
_QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait; more are refused.", 0, 4096)
_QUEUE_QUERIES = flags.DEFINE_integer("queue_queries", 16_384, "Queries of waiting requests; more are refused.", 1)
_MAX_QUERIES = flags.DEFINE_integer("max_queries", Limits.queries, "Queries in one request.", 1)
_MAX_K = flags.DEFINE_integer("max_k", Limits.neighbours, "Neighbours of a query.", 1)
_MAX_SECONDS = flags.DEFINE_float("max_seconds", Limits.seconds, "Longest deadline of a request.", 0.001)
_ATTEMPTS = flags.DEFINE_integer("attempts", 4, "Calls to the replicas of a shard for one request, hedges aside.", 1)
_HEDGE_MS = flags.DEFINE_float("hedge_ms", 100, "Milliseconds to the first hedges; then the 95th percentile.", 1)
_HEDGE_SHARE = flags.DEFINE_float("hedge_share", 0.05, "Hedges for each call at most; 0 never hedges.", 0, 1)
_DRAIN = flags.DEFINE_float("drain_seconds", 0, "Between not ready and refusing new requests, at the end.", 0)
_GRACE = flags.DEFINE_float("grace_seconds", 30, "For requests under way, at the end.", 0)
_RELOAD = flags.DEFINE_float("reload_seconds", 5, "How often to look for a new version; 0 only at SIGHUP.", 0)
_KEEP = flags.DEFINE_float("keep_seconds", 60, "How long an old version that nobody asks for is kept.", 0)
_RECALL = flags.DEFINE_float("recall_seconds", 300, "How often recall is checked again; 0 only at load.", 0)
_MIN_RECALL = flags.DEFINE_float("min_recall", 0.8, "Recall on stored queries below which nothing is served.", 0, 1)
_LOG_REQUESTS = flags.DEFINE_bool("log_requests", False, "Log successful requests too.")


def main() -> None:
    if (_DATABASE.value is None) == (not _BACKENDS.value):
        raise UserError("give --database for a shard server, or --backends for a front")
    if _BACKENDS.value and _SHARDS.value:
        raise UserError("--shards goes with --database")
    if _DATABASE.value and _KEEP.value < _MAX_SECONDS.value:
        raise UserError(
            f"--keep_seconds={_KEEP.value:g} is less than --max_seconds={_MAX_SECONDS.value:g}: a request may wait so "
            "long, and the version that it asks for would be gone; raise the one or lower the other"
        )
    limits = Limits(queries=_MAX_QUERIES.value, neighbours=_MAX_K.value, seconds=_MAX_SECONDS.value)
    identity = _identity()
    options = ServerOptions(
        host=_HOST.value,
        port=_PORT.value,
        health_port=_HEALTH_PORT.value,
        metrics_port=_METRICS_PORT.value,
        metrics_host=_METRICS_HOST.value,
        slots=_SLOTS.value or (64 if _BACKENDS.value else os.cpu_count() or 1),
        queue_requests=_QUEUE.value,
        queue_queries=_QUEUE_QUERIES.value,
        limits=limits,
        security=ServerSecurity(
            identity=identity,
            client_ca=Path(_CLIENT_CA.value) if _CLIENT_CA.value else None,
            tokens=read_tokens(_TOKENS.value) if _TOKENS.value else (),
            allow_plaintext=_PLAINTEXT.value,
        ),
        drain_delay=_DRAIN.value,
        grace=_GRACE.value,
        reload_seconds=_RELOAD.value,
        recall_seconds=_RECALL.value,
        log_requests=_LOG_REQUESTS.value,
    )

    def front(log: Log, metrics: Metrics) -> FrontSource:
        token = read_tokens(_BACKEND_TOKENS.value)[0] if _BACKEND_TOKENS.value else None
        ca = Path(_BACKEND_CA.value) if _BACKEND_CA.value else None
        return FrontSource(
            _BACKENDS.value,
            security=ClientSecurity(ca, identity if ca else None, token, _PLAINTEXT.value),
            patience=Patience(
                attempts=_ATTEMPTS.value,
                hedge_after=_HEDGE_MS.value / 1000 if _HEDGE_SHARE.value else None,
                hedge_share=_HEDGE_SHARE.value,
            ),
            limits=limits,
            log=log,
            metrics=metrics,
        )

    def shards(log: Log, metrics: Metrics) -> LocalSource:
        chosen = ChosenShards.parse(_SHARDS.value) if _SHARDS.value else ChosenShards()
        return LocalSource(
            lambda: open_database(_DATABASE.value, chosen),
            lambda: signature(_DATABASE.value),
            log=log,
            metrics=metrics,
            keep_seconds=_KEEP.value,
            min_recall=_MIN_RECALL.value,
        )

    embedding = Embedding(_EMBEDDER.value) if _EMBEDDER.value else None
    serve(front if _BACKENDS.value else shards, options, embedding=embedding)


def _identity() -> Identity | None:
    if bool(_CERTIFICATE.value) != bool(_KEY.value):
        raise UserError("--tls_certificate and --tls_key go together")
    return Identity(Path(_CERTIFICATE.value), Path(_KEY.value)) if _CERTIFICATE.value else None


if __name__ == "__main__":
    program.run(main)
