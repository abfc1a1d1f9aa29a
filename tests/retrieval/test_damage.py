"""A flipped bit in any data set that is read costs one line, which names the shard, and nothing is made of it."""

import json
import re
import shutil

import numpy as np
import pytest

from retro_jax.data.corpus import Corpus
from retro_jax.data.sequences import write_sequences
from retro_jax.errors import UserError
from retro_jax.retrieval.bm25 import Bm25
from retro_jax.retrieval.compaction import compact_database
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.neighbours import NeighbourTable, find_neighbours
from retro_jax.retrieval.reranking import rerank_neighbours
from retro_jax.retrieval.segments import DatabaseCorpus
from retro_jax.retrieval.update import add_documents, remove_documents

CHUNKS, NAMES = "corpus/chunks-00001-of-00002.npy", "corpus/documents-00001-of-00002.jsonl"
DOCUMENTS, TOKENIZER = "corpus/documents-00000-of-00002.npy", "corpus/tokenizer.model"
VECTORS, FOUND = "embeddings/embeddings-00001-of-00002.npy", "neighbours/neighbours-00000-of-00002.npy"


@pytest.fixture(scope="module")
def sound(make_corpus, tiny_embedder, tmp_path_factory):
    """A database with neighbours, in two shards."""
    directory = tmp_path_factory.mktemp("damage") / "DB"
    words = re.findall(r"\S+", "the cat of a house and 3 birds sing in the tree while it rains, he said; nobody came.")
    texts = [" ".join(np.random.default_rng(i).choice(words, 50)) for i in range(4)]
    records = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    corpus = make_corpus([records[:2], records[2:]], directory / "corpus")
    embed_corpus(corpus, tiny_embedder, directory / "embeddings")
    build_index(EmbeddingSet(directory / "embeddings"), directory / "index", num_shards=2)
    find_neighbours(corpus, directory, directory / "neighbours", k=4)
    return directory


def embed(directory, output, embedder):
    embed_corpus(Corpus(directory / "corpus"), embedder, output)


def index(directory, output, embedder):
    build_index(EmbeddingSet(directory / "embeddings"), output, num_shards=2)


def index_by_cells(directory, output, embedder):
    build_index(EmbeddingSet(directory / "embeddings"), output, num_shards=2, cells=4)


def search(directory, output, embedder):
    find_neighbours(Corpus(directory / "corpus"), directory, output, k=2)


def rerank(directory, output, embedder):
    corpus, table = Corpus(directory / "corpus"), NeighbourTable(directory / "neighbours")
    rerank_neighbours(corpus, table, Bm25(DatabaseCorpus(directory)), output, k=2)


def bm25(directory, output, embedder):
    Bm25.open(directory)


def sequences(directory, output, embedder):
    corpus, table = Corpus(directory / "corpus"), NeighbourTable(directory / "neighbours")
    write_sequences(corpus, table, DatabaseCorpus(directory), output, length=32, k=2)


def opened(directory, output, embedder):
    Database.open(directory)


def compact(directory, output, embedder):
    compact_database(directory, output)


def remove(directory, output, embedder):
    remove_documents(directory, ids=["d0"])


def add(directory, output, embedder):
    new = directory.parent / "new.jsonl"
    new.write_text(json.dumps({"id": "new", "text": "the cat of the house"}))
    add_documents(directory, [new], embedder)


@pytest.mark.parametrize(
    ("name", "work"),
    [
        *((CHUNKS, work) for work in (embed, search, rerank, bm25, sequences, opened, compact)),
        *((DOCUMENTS, work) for work in (search, sequences, opened, compact)),
        *((NAMES, work) for work in (remove, add, compact)),
        *((TOKENIZER, work) for work in (embed, compact)),
        *((VECTORS, work) for work in (index, index_by_cells, search, compact)),
        *((FOUND, work) for work in (rerank, sequences)),
    ],
)
def test_a_flipped_bit_is_named_and_nothing_is_made_of_it(sound, tiny_embedder, tmp_path, name, work):
    directory, output = tmp_path / "DB", tmp_path / "output"
    shutil.copytree(sound, directory)
    data = bytearray((directory / name).read_bytes())
    data[-2] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: checksum differs from the manifest; rebuild [^\n]*$"):
        work(directory, output, tiny_embedder)
    assert not list(output.rglob("index/manifest.json")) and not (output / "manifest.json").exists()
    assert not (directory / "segments.json").exists()
