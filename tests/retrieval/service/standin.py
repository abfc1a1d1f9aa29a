"""A shard server of the real code over a made-up database: it starts in a moment, and is as slow as a test wants.

python standin.py DIRECTORY SHARDS --slots=2 ...   # fields of ServerOptions, --secure=KEYS, --embeds=1; shards like 0,1

The directory has world.json (which database it is) and, when a test puts one there, delay-PORT (seconds of a search);
searching-PORT appears with the first such search.
"""

import contextlib
import dataclasses
import json
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.local import LocalSource
from retro_jax.retrieval.service.security import Identity, ServerSecurity, read_tokens
from retro_jax.retrieval.service.server import ServerOptions, serve
from retro_jax.retrieval.service.wire import Found, Limits

VOCABULARY = 50


def decode(row: Sequence[int]) -> str:
    """The text of a chunk of tokens; as good as any."""
    return " ".join(map(str, row))


def embed(texts: Sequence[str], dimension: int) -> np.ndarray:
    """float32 [n, dimension], made of the checksum of each text; zeros for an empty one."""
    seeds = [zlib.crc32(text.encode()) for text in texts]
    return np.array([np.random.default_rng(seed).normal(size=dimension) * (seed != 0) for seed in seeds], np.float32)


class WorldEmbedding:
    """See `retro_jax.retrieval.service.embedding.Embedding`."""

    def load(self, version: pb.Version) -> None:
        pass

    def vectors(self, texts: list[str], version: pb.Version) -> np.ndarray:
        return embed(texts, version.dimension)


@dataclasses.dataclass(frozen=True)
class World:
    """A database made of a seed: chunk i is in shard i % num_shards and document i // 5."""

    seed: int = 1
    chunks: int = 600
    dimension: int = 8
    num_shards: int = 2
    chunk_length: int = 4

    @property
    def vectors(self) -> np.ndarray:
        return np.random.default_rng(self.seed).normal(size=(self.chunks, self.dimension)).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        return f"world{self.seed}"

    def write(self, directory: Path) -> None:
        """The directory is of this world from now on; by rename, as a database is replaced."""
        (directory / "world.new").write_text(json.dumps(dataclasses.asdict(self)))
        (directory / "world.new").rename(directory / "world.json")

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        values = np.asarray(ids)[..., None] * 8 + np.arange(2 * self.chunk_length)
        return np.where(np.asarray(ids)[..., None] < 0, 0, values).astype(np.int32)

    def search(self, queries, k, exclude_keys=None, shards=None):
        """The exact answer, by (distance, id), of some shards or of all."""
        ids = np.arange(self.chunks)
        ids = ids if shards is None else ids[np.isin(ids % self.num_shards, shards)]
        rows = self.vectors[ids].astype(np.float64)
        found_ids = np.full((len(queries), k), -1, np.int64)
        found = np.full((len(queries), k), np.inf, np.float32)
        for i, query in enumerate(np.asarray(queries, np.float64)):
            if not query.any():
                continue
            keep = np.ones(len(ids), bool) if exclude_keys is None else ~np.isin(ids // 5, exclude_keys[i])
            squares = np.square(rows[keep] - query).sum(1).astype(np.float32)
            order = np.lexsort((ids[keep], squares))[:k]
            found_ids[i, : len(order)], found[i, : len(order)] = ids[keep][order], squares[order]
        return found_ids, found


class WorldHolding:
    """See `retro_jax.retrieval.service.holding.Holding`."""

    tokenizer_model = b"a tokenizer"
    vocab_size = VOCABULARY
    decode = staticmethod(decode)

    def __init__(self, directory: Path, shards: list[int], place: dict) -> None:
        text = (directory / "world.json").read_text()
        if not text.startswith("{"):
            raise UserError(f"{directory}/world.json: checksum differs from the manifest; rebuild it")
        self._directory, self._place = directory, place
        self._world = World(**json.loads(text))
        self._shards = shards
        self.version = pb.Version(
            database=self._world.fingerprint,
            corpus="corpus",
            embedder="embedder",
            tokenizer="tokenizer",
            dimension=self._world.dimension,
            chunk_length=self._world.chunk_length,
            chunks=self._world.chunks,
            num_shards=self._world.num_shards,
            shards=shards,
        )
        self.tokenizer = self

    def search(self, query):
        with contextlib.suppress(FileNotFoundError):
            seconds = float((self._directory / f"delay-{self._place['port']}").read_text())
            (self._directory / f"searching-{self._place['port']}").touch()
            time.sleep(seconds)
        return Found(*self._world.search(query.vectors, query.k, query.exclude_keys, self._shards))

    def neighbour_tokens(self, ids):
        return self._world.tokens(ids)

    def documents(self, ids):
        return [("", "") if i < 0 else (f"document {i // 5}", f"title {i // 5}") for i in ids]

    def routers(self):
        return []

    def recall(self):
        return 0.96875


def main() -> None:
    directory, shards = Path(sys.argv[1]), [int(shard) for shard in sys.argv[2].split(",")]
    given = dict(flag.removeprefix("--").split("=") for flag in sys.argv[3:])
    limits = Limits(seconds=float(given.pop("seconds", 60)))
    start_delay = float(given.pop("start_delay", 0))
    keep_seconds = float(given.pop("keep_seconds", 30))
    embedding = WorldEmbedding() if given.pop("embeds", None) else None
    security = ServerSecurity()
    if keys := given.pop("secure", None):
        identity = Identity(Path(keys) / "ours.pem", Path(keys) / "ours.key")
        security = ServerSecurity(identity, Path(keys) / "ours.ca", read_tokens(Path(keys) / "tokens"))
    numbers = {name: (float if "." in value else int)(value) for name, value in given.items()}
    options = ServerOptions(**{"port": 0, "limits": limits, "security": security, **numbers})
    place = {}

    def started(port: int) -> None:
        place["port"] = port
        print(port, flush=True)

    def open_holding() -> WorldHolding:
        time.sleep(start_delay)
        return WorldHolding(directory, shards, place)

    def source(log, metrics) -> LocalSource:
        signature = lambda: (directory / "world.json").stat().st_ino  # noqa: E731
        return LocalSource(open_holding, signature, log=log, metrics=metrics, keep_seconds=keep_seconds)

    try:
        serve(source, options, embedding=embedding, started=started)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    assert threading.active_count() < 100


if __name__ == "__main__":
    main()
