import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_neighbours import random_table

from retro_jax.data import sequences as sequences_module
from retro_jax.data.distribute import BeamOptions
from retro_jax.data.sequences import SequenceSource, write_sequences
from retro_jax.data.tfrecord import FRAME_BYTES
from retro_jax.errors import UserError


def expected_sequences(corpus, packing, chunks):
    """Chunk ids of every sequence, by a plain walk over the documents."""
    walk = []
    for document in range(corpus.num_documents):
        first, count = corpus.document_range(document)
        ids = list(range(first, first + count))
        if packing == "document":
            walk += [ids[i : i + chunks] for i in range(0, count, chunks)]
        else:
            walk += ids
    return walk if packing == "document" else [walk[i : i + chunks] for i in range(0, len(walk), chunks)]


def expected_example(corpus, table, database, ids, chunks, k, packing):
    M = corpus.chunk_length
    tokens = [token for chunk in ids for token in corpus.tokens(chunk).tolist()]
    tokens += [0] * ((chunks - len(ids)) * M)
    label = 0
    if len(ids) == chunks:
        following = ids[-1] + 1
        same = following < corpus.num_chunks and corpus.document_index(following) == corpus.document_index(ids[-1])
        if following < corpus.num_chunks and (packing == "packed" or same):
            label = int(corpus.tokens(following)[0])
    keys = {int(corpus.document_keys(chunk)) for chunk in ids}
    neighbours = []
    for chunk in ids:
        found = zip(table.ids(np.array([chunk]))[0], table.distances(np.array([chunk]))[0], strict=True)
        kept = [(int(i), float(d)) for i, d in found if i >= 0 and int(database.document_keys(i)) not in keys][:k]
        neighbours.append(kept + [(-1, np.inf)] * (k - len(kept)))
    neighbours += [[(-1, np.inf)] * k] * (chunks - len(ids))
    return [*tokens, label], neighbours


@pytest.mark.parametrize("packing", ["document", "packed"])
@settings(deadline=None, max_examples=6)
@given(chunks=st.integers(1, 4), k=st.integers(1, 5), seed=st.integers(0, 3), shard_records=st.integers(7, 60))
def test_every_sequence_is_what_a_plain_walk_gives(corpora, tmp_path_factory, packing, chunks, k, seed, shard_records):
    corpus, database = corpora
    root = tmp_path_factory.mktemp("sequences")
    table = random_table(root / "table", corpus, database, seed=seed)
    directory = root / "out"
    manifest = write_sequences(
        corpus, table, database, directory,
        length=chunks * 8, k=k, packing=packing, shard_records=shard_records, seed=seed,
    )  # fmt: skip
    source = SequenceSource(directory)
    expected = {tuple(ids): ids for ids in expected_sequences(corpus, packing, chunks)}
    assert len(source) == len(expected) == manifest.counts["sequences"]
    histogram = [0] * (k + 1)
    for index in range(len(source)):
        example = source[index]
        ids = expected.pop(tuple(int(chunk) for chunk in example["chunks"] if chunk >= 0))
        tokens, neighbours = expected_example(corpus, table, database, ids, chunks, k, packing)
        assert example["tokens"].tolist() == tokens
        assert [list(zip(*row, strict=True)) for row in zip(example["neighbour_ids"].tolist(),
                example["distances"].tolist(), strict=True)] == neighbours  # fmt: skip
        assert np.array_equal(example["neighbours"], database.neighbour_tokens(example["neighbour_ids"]))
        padded = np.array([*ids, *[-1] * (chunks - len(ids))])
        assert np.array_equal(example["chunks"], padded)
        assert np.array_equal(example["documents"], corpus.document_index(padded))
        assert np.array_equal(example["document_keys"], corpus.document_keys(padded))
        assert np.array_equal(example["bytes"], corpus.byte_counts(padded))
        if packing == "document":
            assert len(set(corpus.document_index(ids).tolist())) == 1
        for row in neighbours[: len(ids)]:
            histogram[sum(i >= 0 for i, _ in row)] += 1
    assert not expected
    counts = manifest.counts
    assert counts["chunks_by_neighbours"] == histogram
    assert counts["chunks"] == corpus.num_chunks
    assert counts["bytes"] == corpus.num_bytes
    assert counts["tokens"] == corpus.num_tokens
    assert counts["padding_tokens"] == counts["sequences"] * chunks * 8 - corpus.num_tokens


@pytest.fixture(scope="module")
def table(corpora, tmp_path_factory):
    return random_table(tmp_path_factory.mktemp("neighbours") / "table", *corpora)


@pytest.fixture(scope="module")
def written(corpora, table, tmp_path_factory):
    directory = tmp_path_factory.mktemp("written") / "sequences"
    write_sequences(corpora[0], table, corpora[1], directory, length=16, k=2, shard_records=10)
    return directory


def test_arrays_are_ready_for_the_model(written):
    example = SequenceSource(written)[0]
    assert {name: (array.dtype.name, array.shape) for name, array in example.items()} == {
        "bytes": ("int32", (2,)),
        "chunks": ("int64", (2,)),
        "distances": ("float32", (2, 2)),
        "document_keys": ("int64", (2,)),
        "documents": ("int64", (2,)),
        "neighbour_ids": ("int64", (2, 2)),
        "neighbours": ("int32", (2, 2, 16)),
        "tokens": ("int32", (17,)),
    }


def test_order_is_shuffled_over_all_shards_and_fixed_by_the_seed(corpora, table, written, tmp_path):
    def firsts(directory):
        source = SequenceSource(directory)
        return [int(source[i]["chunks"][0]) for i in range(len(source))]

    order = firsts(written)
    assert order != sorted(order)
    assert max(order[:10]) - min(order[:10]) > 20
    options = {"length": 16, "k": 2}
    write_sequences(corpora[0], table, corpora[1], tmp_path / "same", shard_records=23, **options)
    write_sequences(corpora[0], table, corpora[1], tmp_path / "other", shard_records=10, seed=1, **options)
    assert firsts(tmp_path / "same") == order
    assert sorted(firsts(tmp_path / "other")) == sorted(order) and firsts(tmp_path / "other") != order


def test_interrupted_stage_goes_on_and_equals_one_made_at_once(corpora, table, written, tmp_path, monkeypatch):
    calls = []
    examples = sequences_module._examples

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return examples(*arguments)

    monkeypatch.setattr(sequences_module, "_examples", interrupted)
    options = {"length": 16, "k": 2, "shard_records": 10}
    with pytest.raises(KeyboardInterrupt):
        write_sequences(corpora[0], table, corpora[1], tmp_path / "out", **options)
    with pytest.raises(UserError, match="begun and not finished"):
        SequenceSource(tmp_path / "out")
    manifest = write_sequences(corpora[0], table, corpora[1], tmp_path / "out", **options)
    assert manifest == SequenceSource(written).manifest
    assert len(calls) == 1 + len([s for s in manifest.shards if s.name.endswith(".tfrecord")])


def test_several_processes_write_the_same_bytes_as_one(corpora, table, written, tmp_path):
    manifest = write_sequences(
        corpora[0], table, corpora[1], tmp_path / "out",
        length=16, k=2, shard_records=10, options=BeamOptions(workers=2),
    )  # fmt: skip
    assert manifest == SequenceSource(written).manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["manifest.json", *(shard.name for shard in manifest.shards)]
    )


def test_neighbours_that_change_under_the_workers_are_refused(corpora, tmp_path):
    changed = random_table(tmp_path / "table", *corpora)
    changed.fingerprint = "another"
    with pytest.raises(UserError, match="table has changed since the sequences were begun"):
        write_sequences(corpora[0], changed, corpora[1], tmp_path / "out", length=16, k=2)


def test_tokenizer_travels_with_the_sequences(written, tokenizer):
    source = SequenceSource(written)
    assert source.tokenizer_path.read_bytes() == tokenizer.path.read_bytes()
    assert source.tokenizer_fingerprint == tokenizer.fingerprint


def test_inputs_that_do_not_belong_together_are_refused(corpora, table, tmp_path):
    corpus, database = corpora

    def write(corpus=corpus, table=table, database=database, **options):
        write_sequences(corpus, table, database, tmp_path / "out", **{"length": 16, "k": 2, **options})

    for message, arguments in (
        ("those of another corpus", {"corpus": database}),
        ("found in another database", {"database": corpus}),
        ("k is 6; the neighbours hold from 1 to 5", {"k": 6}),
        ("k is 0", {"k": 0}),
        ("length 20 is no multiple of chunk_length 8", {"length": 20}),
        ("packing 'tight' is none of document, packed", {"packing": "tight"}),
        ("shard_records must be at least 1", {"shard_records": 0}),
    ):
        with pytest.raises(UserError, match=message):
            write(**arguments)
    assert not (tmp_path / "out").exists()
    write()
    with pytest.raises(UserError, match=r"settings\.seed = 0, now it is 3"):
        write(seed=3)
    with pytest.raises(UserError, match=r"inputs\.neighbours = table, now it is other"):
        write(table=random_table(tmp_path / "other", corpus, database, fingerprint="other"))


def test_flipped_byte_and_truncated_shard_are_named(corpora, table, tmp_path):
    write_sequences(corpora[0], table, corpora[1], tmp_path / "out", length=16, k=2, shard_records=10)
    source = SequenceSource(tmp_path / "out")
    shard = tmp_path / "out" / source.manifest.shards[1].name
    content = bytearray(shard.read_bytes())
    damaged = content.copy()
    damaged[4 * (source.schema.payload_bytes + FRAME_BYTES) + 100] ^= 4
    shard.write_bytes(damaged)
    source = SequenceSource(tmp_path / "out")
    source[13], source[15]
    with pytest.raises(UserError, match=rf"{shard.name}: wrong checksum of record 4"):
        source[14]
    SequenceSource(tmp_path / "out", verify=False)[14]
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{shard.name}: \d+ bytes, the manifest says"):
        SequenceSource(tmp_path / "out")
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: shard is missing"):
        SequenceSource(tmp_path / "out")


def test_grain_takes_the_source_as_it_is(written):
    source = SequenceSource(written)
    dataset = grain.MapDataset.source(source).shuffle(seed=1)
    firsts = sorted(int(example["chunks"][0]) for example in dataset)
    assert firsts == sorted(int(source[i]["chunks"][0]) for i in range(len(source)))


def test_index_outside_the_data_is_refused(written):
    source = SequenceSource(written)
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]
