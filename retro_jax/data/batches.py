"""Batches as a pure function of the seed and the number of examples seen before.

Grain lays the order out: each source is shuffled (anew in every epoch), the sources are mixed by weight, and the
mixture goes on for ever. Example i of that order is the same whatever the batch size and however many processes share
a batch, so a run resumes in mid-epoch, also on another number of hosts.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from retro_jax.data.records import SequenceSchema
from retro_jax.errors import UserError

_PREFETCHED_BATCHES = 4
_PREFETCH_THREADS = 2
_ENDLESS = 2**62


class Source(Protocol):
    """What is needed of a data set; `retro_jax.data.sequences.SequenceSource` is one."""

    schema: SequenceSchema
    fingerprint: str
    tokenizer_fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Origin(NamedTuple):
    """Where an example comes from: number of its source, how often that was gone through before, index in it."""

    source: int
    epoch: int
    index: int


class Batches:
    """The endless order of examples, cut into batches.

    Attributes:
      batch_size: B, over all processes.
      rows: numbers of the rows of the global batch that this process reads, ascending.
      weights: share of each source, summing to 1. Grain keeps them to about one part in a hundred of the smallest.
      neighbours: K, the fewest that a source has; of the others the first K are taken.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Lays out the order.

        Args:
          sources: data sets of sequences with one tokenizer, T, M and R.
          batch_size: B.
          seed: of the shuffles.
          weights: of the sources in the mixture; default their numbers of sequences.
          shuffle: False takes each source in its stored order.
          rows: numbers of the rows of the global batch that this process reads, ascending; default all.

        Raises:
          UserError: no or empty sources, sources that do not fit together, impossible weights, batch size or rows.
        """
        weights = [len(source) for source in sources] if weights is None else list(weights)
        rows = tuple(range(batch_size) if rows is None else rows)
        _check(sources, batch_size, seed, weights, rows)
        self.batch_size = batch_size
        self.rows = rows
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.neighbours = min(source.schema.neighbours for source in sources)
        self._sources = list(sources)
        self._seed = seed
        self._shuffle = shuffle
        self._order = grain.MapDataset.mix(
            [self._source_order(number, len(source)) for number, source in enumerate(sources)], weights=self.weights
        ).repeat()

    def origin(self, example: int) -> Origin:
        """Where example number `example` of the order comes from."""
        return self._order[example]

    def examples(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Examples first to first + count - 1 of the order, each feature stacked on a new first axis."""
        return self._stacked(range(first, first + count))

    def at(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of batch `step`, from 0."""
        return self._rows_from(step * self.batch_size)

    def iterate(self, first_example: int = 0) -> "BatchStream":
        """Endless batches, of which the first begins at example `first_example`, read ahead in the background."""
        return BatchStream(self, first_example)

    def state(self, examples_seen: int) -> dict[str, Any]:
        """All that is needed to go on: plain JSON, a few hundred bytes."""
        return {"examples_seen": examples_seen, **self._identity()}

    def check_state(self, state: dict[str, Any]) -> int:
        """Compares a saved state with this order; gives its `examples_seen`.

        Raises:
          UserError: the order is another one; the message names what differs.
        """
        for name, now in self._identity().items():
            then = state.get(name)
            same = np.shape(then) == np.shape(now) and (
                np.allclose(then, now, rtol=1e-9) if name == "weights" else then == now
            )
            if not same:
                raise UserError(
                    f"the run was begun with other data: {name} was {then}, now it is {now}; "
                    "go on with the same data, or start in a new workdir"
                )
        return int(state["examples_seen"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "weights": list(self.weights),
            "fingerprints": [source.fingerprint for source in self._sources],
        }

    def _source_order(self, number: int, length: int) -> grain.MapDataset:
        order = grain.MapDataset.range(length)
        if self._shuffle:
            # Grain adds the epoch to the seed, so neighbouring seeds would share their epochs: hash it first.
            digest = blake2b(f"{self._seed}/{number}".encode(), digest_size=4).digest()
            order = order.shuffle(seed=int.from_bytes(digest, "little"))
        return order.map_with_index(lambda example, index: Origin(number, example // length, int(index)))

    def _read(self, origin: Origin) -> dict[str, np.ndarray]:
        example = self._sources[origin.source][origin.index]
        if self._sources[origin.source].schema.neighbours > self.neighbours:
            for name in ("neighbours", "neighbour_ids", "distances"):
                example[name] = example[name][:, : self.neighbours]
        return example

    def _rows_from(self, first_example: int) -> dict[str, np.ndarray]:
        return self._stacked([first_example + row for row in self.rows])

    def _stacked(self, examples: Sequence[int]) -> dict[str, np.ndarray]:
        found = [self._read(self._order[example]) for example in examples]
        return {name: np.stack([example[name] for example in found]) for name in found[0]}


class BatchStream:
    """Endless iterator of batches with threads that read ahead; a context manager, or call `close`."""

    def __init__(self, batches: Batches, first_example: int) -> None:
        self._iterator = iter(
            grain.MapDataset.range(_ENDLESS)
            .map(lambda step: batches._rows_from(first_example + step * batches.batch_size))
            .to_iter_dataset(grain.ReadOptions(num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES))
        )

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        """Ends the threads."""
        self._iterator.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(
    sources: Sequence[Source], batch_size: int, seed: int, weights: Sequence[float], rows: tuple[int, ...]
) -> None:
    if not sources:
        raise UserError("no data sets are given to read batches from")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, is {batch_size}")
    if seed < 0:
        raise UserError(f"the seed must not be negative, is {seed}")
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
        raise UserError(f"rows {rows} are no ascending part of a batch of {batch_size}")
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} data sets")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(
            f"weights must be positive, found {list(weights)} (leave out a data set, or one without sequences)"
        )
    first = sources[0]
    for number, source in enumerate(sources):
        if source.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(f"data set {number} was made with another tokenizer than data set 0")
        for name in ("length", "chunk_length", "neighbour_length"):
            if getattr(source.schema, name) != getattr(first.schema, name):
                raise UserError(
                    f"data set {number} has {name} {getattr(source.schema, name)}, data set 0 has "
                    f"{getattr(first.schema, name)}"
                )
