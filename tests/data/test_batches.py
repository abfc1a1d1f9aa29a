import json
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.batches import Batches
from retro_jax.data.records import SequenceSchema
from retro_jax.errors import UserError

SCHEMA = SequenceSchema(8, 4, 3, 8, 100)


class Numbers:
    """A data set whose sequence i holds its own number, by a thousand times the data set's."""

    def __init__(self, length, number=0, schema=SCHEMA, fingerprint=None, tokenizer="t"):
        self.length, self.number, self.schema, self.reads = length, number, schema, 0
        self.fingerprint = fingerprint or f"{number}/{length}"
        self.tokenizer_fingerprint = tokenizer
        self.threads = set()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        self.threads.add(threading.current_thread().name)
        self.reads += 1
        value = self.number * 1000 + index
        K = self.schema.neighbours
        return {
            "tokens": np.full(9, value, np.int32),
            "neighbours": np.arange(2 * K * 8, dtype=np.int32).reshape(2, K, 8),
            "neighbour_ids": np.zeros((2, K), np.int64),
            "distances": np.zeros((2, K), np.float32),
        }


def numbers(batch):
    return batch["tokens"][:, 0].tolist()


@settings(deadline=None, max_examples=15)
@given(length=st.one_of(st.integers(1, 5), st.integers(40, 90)), seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_every_epoch_holds_every_sequence_once_in_another_order(length, seed, epochs):
    batches = Batches([Numbers(length)], batch_size=3, seed=seed)
    orders = []
    for epoch in range(epochs):
        order = numbers(batches.examples(epoch * length, length))
        assert sorted(order) == list(range(length))
        assert [batches.origin(epoch * length + i) for i in range(length)] == [(0, epoch, index) for index in order]
        orders.append(tuple(order))
    if length > 10:
        assert len(set(orders)) == epochs
        assert orders[0] != tuple(range(length))


@settings(deadline=None, max_examples=15)
@given(batch_sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 9))
def test_the_order_does_not_depend_on_the_batch_size(batch_sizes, seed):
    def order(batch_size):
        batches = Batches([Numbers(70), Numbers(50, 1)], batch_size=batch_size, seed=seed)
        return [number for step in range(200 // batch_size) for number in numbers(batches.at(step))]

    one, two = map(order, batch_sizes)
    common = min(len(one), len(two))
    assert one[:common] == two[:common]


@settings(deadline=None, max_examples=15)
@given(owners=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=8), step=st.integers(0, 1000))
def test_every_process_reads_its_rows_of_the_one_batch(owners, step):
    """A row may be held by several processes, when a model axis spans them."""
    size = len(owners)
    sources = [Numbers(13), Numbers(7, 1)]
    whole = Batches(sources, batch_size=size, seed=1).at(step)
    for process in set.union(*owners):
        rows = tuple(row for row in range(size) if process in owners[row])
        part = Batches(sources, batch_size=size, seed=1, rows=rows).at(step)
        for name in whole:
            assert np.array_equal(part[name], whole[name][list(rows)])


def test_only_the_rows_of_the_process_are_read():
    class Counted(Numbers):
        read = ()

        def __getitem__(self, index):
            self.read += (index,)
            return super().__getitem__(index)

    source = Counted(20)
    batches = Batches([source], batch_size=6, seed=0, rows=(0, 3, 5))
    batches.at(2)
    assert source.read == tuple(batches.origin(12 + row).index for row in (0, 3, 5))


def test_stream_gives_the_batches_of_their_steps_from_any_start():
    rows = [1, 3]
    batches = Batches([Numbers(11), Numbers(23, 1)], batch_size=4, seed=5, rows=rows)
    for first in (0, 4, 30, 7):
        with batches.iterate(first) as stream:
            for step in range(5):
                expected = batches.examples(first + 4 * step, 4)
                batch = next(stream)
                assert batch.keys() == expected.keys()
                assert all(np.array_equal(batch[name], expected[name][rows]) for name in batch)


def test_stream_reads_ahead_in_other_threads():
    source = Numbers(50)
    with Batches([source], batch_size=2, seed=0).iterate() as stream:
        next(stream)
        assert threading.current_thread().name not in source.threads
        deadline = time.monotonic() + 30
        while source.reads < 4 and time.monotonic() < deadline:  # the second batch, which nobody has asked for
            time.sleep(0.005)
        assert source.reads >= 4


def test_weights_are_the_shares_of_the_sources():
    sources = [Numbers(400), Numbers(100, 1), Numbers(60, 2)]
    batches = Batches(sources, batch_size=8, seed=0, weights=[0.6, 0.3, 0.1])
    counts = Counter(batches.origin(i).source for i in range(1000))
    assert [counts[i] for i in range(3)] == pytest.approx([600, 300, 100], abs=5)
    seen = Counter(batches.origin(i).index for i in range(1000) if batches.origin(i).source == 2)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_without_weights_the_sources_go_by_their_sizes():
    batches = Batches([Numbers(30), Numbers(10, 1)], batch_size=8, seed=0)
    assert batches.weights == (0.75, 0.25)
    assert sorted(numbers(batches.examples(0, 40))) == [*range(30), *range(1000, 1010)]


def test_sources_and_seeds_have_their_own_orders():
    sources = [Numbers(30), Numbers(30, 1)]
    order = [Batches(sources, batch_size=1, seed=0).origin(i) for i in range(60)]
    first, second = ([o.index for o in order if o.source == s] for s in (0, 1))
    assert first != second
    other = [Batches(sources, batch_size=1, seed=1).origin(i) for i in range(60)]
    assert order != other
    # Not the same permutations one epoch later either.
    assert [Batches(sources[:1], batch_size=1, seed=0).origin(30 + i).index for i in range(30)] != [
        Batches(sources[:1], batch_size=1, seed=1).origin(i).index for i in range(30)
    ]


def test_unshuffled_order_is_the_stored_one():
    batches = Batches([Numbers(5)], batch_size=3, seed=0, shuffle=False)
    assert numbers(batches.examples(0, 12)) == [*range(5), *range(5), 0, 1]


def test_the_order_is_the_same_in_another_process_and_needs_no_tensorflow():
    code = (
        "from retro_jax.data.batches import Batches; import sys; sys.path.insert(0, sys.argv[1]);"
        "from test_batches import Numbers;"
        "b = Batches([Numbers(37), Numbers(11, 1)], batch_size=4, seed=3, weights=[3, 1]);"
        "import retro_jax.data.sequences;"
        "assert not {'tensorflow', 'scann'} & sys.modules.keys();"
        "print([b.at(s)['tokens'][:, 0].tolist() for s in (0, 9, 10**6)]);"
        "stream = b.iterate(); next(stream)"  # left open: the process must end all the same
    )
    here = __file__.rsplit("/", 1)[0]
    result = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, check=True, timeout=120)
    batches = Batches([Numbers(37), Numbers(11, 1)], batch_size=4, seed=3, weights=[3, 1])
    assert json.loads(result.stdout) == [numbers(batches.at(step)) for step in (0, 9, 10**6)]


def test_the_fewest_neighbours_of_a_source_are_given():
    wide = Numbers(5, 1, schema=SequenceSchema(8, 4, 5, 8, 100))
    batches = Batches([Numbers(5), wide], batch_size=4, seed=0)
    assert batches.neighbours == 3
    batch = batches.at(0)
    assert batch["neighbours"].shape == (4, 2, 3, 8)
    assert batch["neighbour_ids"].shape == batch["distances"].shape == (4, 2, 3)


def test_state_is_small_and_checked_by_name():
    sources = [Numbers(5), Numbers(7, 1)]
    batches = Batches(sources, batch_size=4, seed=0)
    state = json.loads(json.dumps(batches.state(24)))
    assert len(json.dumps(state)) < 500
    assert batches.check_state(state) == 24
    assert Batches(sources, batch_size=6, seed=0, rows=(2, 4)).check_state(state) == 24
    for name, other in (
        ("seed", Batches(sources, batch_size=4, seed=1)),
        ("shuffle", Batches(sources, batch_size=4, seed=0, shuffle=False)),
        ("weights", Batches(sources, batch_size=4, seed=0, weights=[1, 1])),
        ("fingerprints", Batches([sources[0], Numbers(7, 1, fingerprint="x")], batch_size=4, seed=0)),
        ("weights", Batches(sources[:1], batch_size=4, seed=0)),
    ):
        with pytest.raises(UserError, match=f"begun with other data: {name} was"):
            other.check_state(state)


def test_a_damaged_record_reaches_the_reader_of_the_stream():
    class Damaged(Numbers):
        def __getitem__(self, index):
            if index == 3:
                raise UserError("shard.tfrecord: wrong checksum of record 3")
            return super().__getitem__(index)

    with Batches([Damaged(5)], batch_size=5, seed=0).iterate() as stream, pytest.raises(UserError, match="record 3"):
        next(stream)


def test_what_cannot_be_is_refused():
    one = Numbers(5)
    other_length = Numbers(5, 1, schema=SequenceSchema(16, 4, 3, 8, 100))
    for message, sources, options in (
        ("no data sets", [], {}),
        ("batch_size must be at least 1", [one], {"batch_size": 0}),
        ("rows \\(2, 9\\)", [one], {"rows": (2, 9)}),
        ("rows \\(2, 2\\)", [one], {"rows": (2, 2)}),
        ("rows \\(3, 1\\)", [one], {"rows": (3, 1)}),
        ("rows \\(-1, 1\\)", [one], {"rows": (-1, 1)}),
        ("rows \\(\\)", [one], {"rows": ()}),
        ("2 weights for 1", [one], {"weights": [1, 2]}),
        ("weights must be positive", [one], {"weights": [0]}),
        ("weights must be positive", [one], {"weights": [float("nan")]}),
        ("weights must be positive", [one, Numbers(0, 1)], {}),
        ("another tokenizer", [one, Numbers(5, 1, tokenizer="u")], {}),
        ("data set 1 has length 16, data set 0 has 8", [one, other_length], {}),
        ("seed must not be negative", [one], {"seed": -1}),
    ):
        with pytest.raises(UserError, match=message):
            Batches(sources, **{"batch_size": 4, "seed": 0, **options})
