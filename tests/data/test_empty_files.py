"""Files of 0 bytes and documents without text go through the whole build beside others."""

import shutil

import numpy as np
from build_all import build_all
from sample_data import SAMPLE, write_jsonl

from retro_jax.data.corpus import Corpus
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.text import read_documents
from retro_jax.retrieval.neighbours import NeighbourTable


def test_files_without_a_document_are_shards_without_a_chunk(tokenizer, tmp_path):
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    documents = [{"id": document.id, "text": document.text[:900]} for document in read_documents([SAMPLE])]
    (tmp_path / "train-0.jsonl").write_bytes(b"")
    write_jsonl(tmp_path / "train-1.jsonl", documents)
    write_jsonl(tmp_path / "train-2.jsonl", [{"id": "empty", "text": ""}, {"id": "blank", "text": " \n"}])
    (tmp_path / "valid-0.jsonl").write_bytes(b"")
    build_all(tmp_path, tmp_path / "out", 1)
    corpus = Corpus(tmp_path / "out" / "corpus")
    assert np.diff(corpus.shard_offsets).tolist() == [0, corpus.num_chunks, 0]
    assert (corpus.num_documents, corpus.manifest.counts["empty_documents"]) == (len(documents), 2)
    assert (NeighbourTable(tmp_path / "out" / "neighbours").ids(np.arange(corpus.num_chunks))[:, 0] >= 0).all()
    assert SequenceSource(tmp_path / "out" / "sequences")[0]["chunks"][0] >= 0
