"""A library of neighbours made for tests, and a server in a thread of this process."""

import contextlib
import threading

import numpy as np
from small_run import M

from retro_jax.explorer.serving import create_server, listen
from retro_jax.retrieval.database import Neighbours

SCRIPT = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


class Library:
    """A retriever whose neighbours are a function of the chunk: first a text with a script, then what repeats it."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self.chunks = tokenizer, 0
        self.broken = self.changed = False

    def retrieve(self, chunk_tokens, k):
        if self.broken:
            raise ConnectionError("the service is gone")
        self.chunks += len(chunk_tokens)
        tokens = np.zeros((len(chunk_tokens), k, 2 * M), np.int32)
        for row, chunk in enumerate(chunk_tokens):
            script = self._tokenizer.encode(SCRIPT)
            start = int(chunk.sum()) % (len(script) - 2 * M)
            tokens[row, 0] = script[start : start + 2 * M]
            tokens[row, 1] = [*chunk, *chunk[::-1]]
        ids = np.tile(np.arange(k), (len(chunk_tokens), 1))
        return Neighbours(ids, ids.astype(np.float32) + 0.25, tokens)

    def refresh(self):
        return self.changed

    def documents(self, ids):
        return [("", "") if chunk < 0 else (f"doc-{chunk}", SCRIPT) for chunk in ids.tolist()]


@contextlib.contextmanager
def serving(app):
    """Serves an application from a thread; gives the port."""
    listener = listen(0)
    server = create_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
