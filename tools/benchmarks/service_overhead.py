"""What the retrieval service costs over the same search in this process, at several batch sizes.

The three ways take turns, a few requests each, so that a busy machine slows all of them alike: the library, one server
with the whole database, and a front before one server for each half of the index. Within a turn a request follows the
other, as those of a client do; alternated one by one, every process would find the processor's caches full of the
others' vectors.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.service.client import RetrievalClient

BATCHES = (1, 64)
K = 2
TURN = 20  # requests
_PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "serve_retrieval.py"


def overhead_lines(directory: Path, embeddings: EmbeddingSet, *, rounds: int) -> Iterator[dict[str, Any]]:
    """Times searches for the vectors of random chunks.

    Args:
      directory: of the database.
      embeddings: whose vectors are the queries.
      rounds: requests of each way and batch size.

    Raises:
      UserError: no such database, or a server does not start.

    Yields:
      way, batch, milliseconds (median), overhead_ms and overhead_percent over the library.
    """
    database = Database.open(directory)
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(_serving(f"--database={directory}"))
        ways: dict[str, Callable[[np.ndarray], Any]] = {"library": lambda vectors: database.search(vectors, K)}
        ways["server"] = _asking(stack, whole)
        if database.num_index_shards > 1:
            halves = [stack.enter_context(_serving(f"--database={directory}", f"--shards={i}/2")) for i in range(2)]
            ways["front"] = _asking(stack, stack.enter_context(_serving(f"--backends={','.join(halves)}")))
        rng = np.random.default_rng(0)
        for batch in BATCHES:
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for first in range(0, rounds, TURN):
                asked = [
                    embeddings.vectors(np.sort(rng.choice(len(embeddings), batch, replace=False)))
                    for _ in range(min(TURN, rounds - first))
                ]
                for way, search in ways.items():
                    for vectors in asked:
                        begun = time.perf_counter()
                        search(vectors)
                        seconds[way].append(time.perf_counter() - begun)
            medians = {way: 1000 * statistics.median(times) for way, times in seconds.items()}
            for way, milliseconds in medians.items():
                over = milliseconds - medians["library"]
                yield {
                    "benchmark": "service",
                    "way": way,
                    "batch": batch,
                    "vectors": database.size,
                    "milliseconds": round(milliseconds, 3),
                    "overhead_ms": round(over, 3),
                    "overhead_percent": round(100 * over / medians["library"], 1),
                }


def _asking(stack: contextlib.ExitStack, address: str) -> Callable[[np.ndarray], Any]:
    client = stack.enter_context(RetrievalClient(address))
    client.wait_until_ready(60)
    return lambda vectors: client.search(vectors, K)


@contextlib.contextmanager
def _serving(*flags: str) -> Iterator[str]:
    """A server process; gives its address when it is ready."""
    command = [sys.executable, str(_PROGRAM), "--port=0", "--recall_seconds=0", "--reload_seconds=0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = ""
        for line in process.stderr:
            if not line.startswith("{"):
                raise UserError(line.strip().removeprefix("error: "))
            event = json.loads(line)
            address = event.get("address", address)
            if event["event"] == "ready":
                break
        yield address
    finally:
        process.terminate()
        process.communicate()
