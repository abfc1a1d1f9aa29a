import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import write_jsonl

from retro_jax.data.chunking import document_key, token_dtype
from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError

TEXTS = st.text(st.sampled_from("ab \n\u2581é日\U0001f600"), min_size=1, max_size=40).filter(str.strip)


def written(tmp_path, tokenizer, files, name="out", **options):
    """A corpus of files given as lists of texts."""
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    paths = [
        write_jsonl(tmp_path / f"{name}-{i}.jsonl", [{"text": text} for text in texts]) for i, texts in enumerate(files)
    ]
    build_corpus(paths, tokenizer, tmp_path / name / "corpus", **options)
    return Corpus(tmp_path / name / "corpus", verify=True)


@settings(deadline=None, max_examples=25)
@given(files=st.lists(st.lists(TEXTS, max_size=4), min_size=1, max_size=3), chunk_length=st.integers(1, 9))
def test_chunks_are_the_documents_cut_from_their_starts(tokenizer, tmp_path_factory, files, chunk_length):
    files[0].append("a long enough document")
    corpus = written(tmp_path_factory.mktemp("corpus"), tokenizer, files, chunk_length=chunk_length)
    texts = [text for file in files for text in file]
    chunk = 0
    for index, text in enumerate(texts):
        ids = [1, *tokenizer.encode(text), 2]
        count = -(-len(ids) // chunk_length)
        assert corpus.document_range(index) == (chunk, count)
        for place in range(count):
            expected = ids[place * chunk_length : (place + 1) * chunk_length]
            padding = chunk_length - len(expected)
            assert corpus.tokens(chunk).tolist() == expected + [0] * padding
            assert corpus.lengths(chunk) == len(expected)
            assert corpus.byte_counts(chunk) == len(tokenizer.decode_bytes(expected))
            assert corpus.document_index(chunk) == index
            assert corpus.continuation(chunk) == (chunk + 1 if place + 1 < count else -1)
            chunk += 1
        assert corpus.document(index).bytes == len(text.encode())
    every = np.arange(chunk)
    assert corpus.num_chunks == chunk
    assert corpus.num_documents == len(texts)
    assert corpus.num_tokens == corpus.lengths(every).sum()
    assert corpus.num_bytes == corpus.byte_counts(every).sum() == sum(len(text.encode()) for text in texts)
    assert tokenizer.decode(corpus.tokens(every)) == "".join(texts)


def test_neighbour_is_chunk_and_continuation_and_never_crosses_a_document(corpora):
    for corpus in corpora:
        ids = np.arange(-1, corpus.num_chunks)
        rows = corpus.neighbour_tokens(ids)
        M = corpus.chunk_length
        assert rows.shape == (len(ids), 2 * M) and rows.dtype == np.int32
        for chunk, row in zip(ids, rows, strict=True):
            if chunk < 0:
                assert not row.any()
                continue
            assert row[:M].tolist() == corpus.tokens(chunk).tolist()
            first, count = corpus.document_range(int(corpus.document_index(chunk)))
            last = chunk == first + count - 1
            assert row[M:].tolist() == ([0] * M if last else corpus.tokens(chunk + 1).tolist())


def test_reader_takes_ids_of_any_shape_and_minus_one(corpora):
    corpus, _ = corpora
    ids = np.array([[5, -1, 0], [corpus.num_chunks - 1, 5, -1]])
    for method in (
        corpus.tokens,
        corpus.lengths,
        corpus.byte_counts,
        corpus.document_index,
        corpus.document_keys,
        corpus.continuation,
        corpus.neighbour_tokens,
    ):
        together = method(ids)
        assert together.shape[:2] == ids.shape
        for place in np.ndindex(ids.shape):
            assert np.array_equal(together[place], method(int(ids[place])))
    assert corpus.tokens(-1).tolist() == [0] * corpus.chunk_length
    assert (corpus.lengths(-1), corpus.byte_counts(-1), corpus.document_index(-1)) == (0, 0, -1)
    assert (corpus.document_keys(-1), corpus.continuation(-1)) == (-1, -1)
    assert corpus.tokens(np.zeros((0, 2), np.int64)).shape == (0, 2, corpus.chunk_length)


def test_ids_outside_the_corpus_are_refused(corpora):
    corpus, _ = corpora
    for ids in (corpus.num_chunks, -2, [0, corpus.num_chunks]):
        for method in (corpus.tokens, corpus.document_index, corpus.continuation, corpus.neighbour_tokens):
            with pytest.raises(IndexError):
                method(ids)
    for index in (-1, corpus.num_documents):
        with pytest.raises(IndexError):
            corpus.document(index)


def test_documents_keep_id_group_and_metadata_and_share_keys_by_group(tokenizer, tmp_path):
    one = write_jsonl(
        tmp_path / "one.jsonl",
        [
            {"id": "a", "group": "book", "title": "Ünïcode", "text": "part one of the book " * 9},
            {"id": "b", "text": "alone"},
        ],
    )
    two = write_jsonl(tmp_path / "two.jsonl", [{"id": "c", "group": "book", "text": "part two of the book"}])
    build_corpus([one, two], tokenizer, tmp_path / "corpus", chunk_length=8)
    corpus = Corpus(tmp_path / "corpus")
    records = [corpus.document(index) for index in range(3)]
    assert [(record.id, record.group) for record in records] == [("a", "book"), ("b", "b"), ("c", "book")]
    assert records[0].metadata == {"title": "Ünïcode"}
    assert records[0].key == records[2].key == document_key("book") != records[1].key
    assert all(0 <= record.key < 2**63 for record in records)
    firsts, counts = np.concatenate(list(corpus.document_ranges()), axis=1)
    for index, record in enumerate(records):
        assert (record.first_chunk, record.chunks) == corpus.document_range(index) == (firsts[index], counts[index])
        assert corpus.document_keys(record.first_chunk) == record.key
    assert corpus.text(0) + corpus.text(1) == tokenizer.decode(corpus.tokens([0, 1]))
    assert corpus.tokenizer.fingerprint == tokenizer.fingerprint == corpus.tokenizer_fingerprint


def test_token_type_holds_every_id():
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_large_text_file_is_one_group(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text("a line of the book\n" * 100)
    small = lambda paths, **options: read_documents(paths, piece_bytes=300, **options)  # noqa: E731
    monkeypatch.setattr("retro_jax.data.sources.read_documents", small)
    build_corpus([path], tokenizer, tmp_path / "corpus", chunk_length=8)
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.num_documents > 3
    assert corpus.num_bytes == path.stat().st_size
    assert len(set(corpus.document_keys(np.arange(corpus.num_chunks)).tolist())) == 1


def test_interrupted_corpus_goes_on_and_equals_one_made_at_once(tokenizer, tmp_path, monkeypatch):
    files = [[f"document {i} of file {file} with some words" for i in range(4)] for file in range(3)]
    whole = written(tmp_path, tokenizer, files, chunk_length=4)
    paths = [tmp_path / f"out-{i}.jsonl" for i in range(3)]
    encode = Tokenizer.encode_array

    def interrupted(self, text):
        if text.startswith("document 2 of file 1"):
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(paths, tokenizer, tmp_path / "again", chunk_length=4)
    with pytest.raises(UserError, match="begun and not finished"):
        Corpus(tmp_path / "again")
    texts = []
    monkeypatch.setattr(Tokenizer, "encode_array", lambda self, text: texts.append(text) or encode(self, text))
    manifest = build_corpus(paths, tokenizer, tmp_path / "again", chunk_length=4)
    assert manifest == whole.manifest
    assert not any("of file 0" in text for text in texts)
    texts.clear()
    assert build_corpus(paths, tokenizer, tmp_path / "again", chunk_length=4) == manifest
    assert texts == []


def test_other_settings_tokenizer_or_input_are_refused_by_name(tokenizer, tmp_path):
    written(tmp_path, tokenizer, [["some words in a document"]], chunk_length=4)
    path = tmp_path / "out-0.jsonl"
    with pytest.raises(UserError, match=r"settings\.chunk_length = 4, now it is 8"):
        build_corpus([path], tokenizer, tmp_path / "out" / "corpus", chunk_length=8)
    path.write_text(json.dumps({"text": "other words"}))
    with pytest.raises(UserError, match=r"inputs\.out-0\.jsonl"):
        build_corpus([path], tokenizer, tmp_path / "out" / "corpus", chunk_length=4)


def test_an_id_used_twice_is_named_with_both_places_or_left_out(tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "x", "text": "first text of it"}, {"id": "y", "text": "other"}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"id": "z", "text": "fine"}, {"id": "y", "text": "second text of it"}])
    within = write_jsonl(tmp_path / "within.jsonl", [{"id": "x", "text": "a"}, {"id": "x", "text": "b"}])
    with pytest.raises(UserError, match=r"within\.jsonl:2: the id 'x' was already used at .*within\.jsonl:1"):
        build_corpus([within], tokenizer, tmp_path / "bad", chunk_length=4)
    with pytest.raises(UserError, match=r"two\.jsonl:2: the id 'y' was already used at .*one\.jsonl:2"):
        build_corpus([one, two], tokenizer, tmp_path / "bad", chunk_length=4)
    assert not (tmp_path / "bad").exists()
    manifest = build_corpus([one, two, within], tokenizer, tmp_path / "skipped", chunk_length=4, skip_bad=True)
    assert manifest.counts["duplicate_documents"] == 3
    assert [Corpus(tmp_path / "skipped").document(i).id for i in range(3)] == ["x", "y", "z"]
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "skipped").iterdir()) == sorted(
        ["chunks", "documents", "documents"] * 3 + ["manifest.json", "tokenizer.model"]
    )


def test_bad_lines_stop_the_build_or_are_counted(tokenizer, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "some words in a document"}\n{"text": "\xff"}\n{"text": "  "}\nbroken\n')
    with pytest.raises(UserError, match=r"f\.jsonl:2: not UTF-8"):
        build_corpus([path], tokenizer, tmp_path / "corpus", chunk_length=4)
    counts = build_corpus([path], tokenizer, tmp_path / "corpus2", chunk_length=4, skip_bad=True).counts
    assert (counts["documents"], counts["bad_lines"], counts["empty_documents"]) == (1, 2, 1)


def test_empty_corpus_and_corpus_shorter_than_a_chunk_are_refused_and_leave_nothing(tokenizer, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match=r"f\.jsonl: no document with text in it"):
        build_corpus([path], tokenizer, tmp_path / "corpus")
    path.write_text(json.dumps({"text": "short"}))
    with pytest.raises(UserError, match="no document fills a chunk of 64 tokens"):
        build_corpus([path], tokenizer, tmp_path / "corpus")
    with pytest.raises(UserError, match="no input files"):
        build_corpus([], tokenizer, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    path.write_text(json.dumps({"text": "long enough " * 64}))
    build_corpus([path], tokenizer, tmp_path / "corpus")


def test_damaged_shards_are_named(tokenizer, tmp_path):
    written(tmp_path, tokenizer, [["some words in a document"]], chunk_length=4)
    directory = tmp_path / "out" / "corpus"
    shard = directory / "chunks-00000-of-00001.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    with pytest.raises(UserError, match=r"chunks-00000-of-00001\.npy: \d+ bytes, the manifest says"):
        Corpus(directory)
    shard.write_bytes(content[:-3] + b"\x01\x02\x03")
    with pytest.raises(UserError, match=r"chunks-00000-of-00001\.npy: checksum differs"):
        Corpus(directory, verify=True)
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(UserError, match=r"chunks-00000-of-00001\.npy: not a shard of a corpus"):
        Corpus(directory)
    with pytest.raises(UserError, match="no such directory"):
        Corpus(tmp_path / "nowhere")
