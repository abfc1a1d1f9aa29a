"""A table of random neighbours, kept in a directory so that workers can open it again."""

import json
from pathlib import Path

import numpy as np


class RandomNeighbours:
    """Random neighbours: some missing at the end of a row, ids repeated between rows."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.rows = np.load(self.directory / "rows.npy")
        self.k = self.rows.shape[1]
        for name, value in json.loads((self.directory / "names.json").read_text()).items():
            setattr(self, name, value)

    def verify(self):
        """Made-up rows have no checksum."""

    def ids(self, chunks):
        return self.rows[chunks]

    def distances(self, chunks):
        rank = np.arange(self.k, dtype=np.float32)
        return np.where(self.rows[chunks] >= 0, rank + np.asarray(chunks)[:, None], np.inf).astype(np.float32)


def random_table(directory, corpus, database, k=5, seed=0, fingerprint="table"):
    """A new table in a new directory."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, database.num_chunks, (corpus.num_chunks, k))
    rows[np.arange(k) >= rng.integers(0, k + 1, corpus.num_chunks)[:, None]] = -1
    directory.mkdir()
    np.save(directory / "rows.npy", rows)
    names = {
        "fingerprint": fingerprint,
        "corpus_fingerprint": corpus.fingerprint,
        "database_fingerprint": "database",
        "database_corpus_fingerprint": database.fingerprint,
    }
    (directory / "names.json").write_text(json.dumps(names))
    return RandomNeighbours(directory)
