"""A RETRO that has learnt to look facts up, in the time of a test: see tools/make_planted_text.py."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from small_run import run_program

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.sequences import write_sequences
from retro_jax.data.stage import Stage, shard_name
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import Tokenizer, train_tokenizer
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.neighbours import NeighbourTable, neighbour_dtype

M = 32


@dataclasses.dataclass(frozen=True)
class PlantedRun:
    """Texts, the workdir of a trained run, and the directory of a database that holds the held-out people's entries."""

    text: Path
    workdir: Path
    database: Path

    def lines(self, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.text / f"{name}.jsonl").read_text().splitlines()]


def make_planted_run(root: Path, embedder: Embedder) -> PlantedRun:
    """Trains with the neighbours that a search would find, so that only the held-out people's entries are embedded."""
    text, workdir, database = root / "text", root / "run", root / "database"
    flags = (f"--output={text}", "--people=3000", "--held_out=40", "--late=8")
    status, _, stderr = run_program("tools/make_planted_text.py", *flags)
    assert status == 0, stderr
    lines = (text / "register.jsonl").read_text().splitlines(keepends=True)
    (text / "known.jsonl").write_text("".join(lines[-40:]))
    texts = [document.text for document in read_documents([text / "train.jsonl", text / "register.jsonl"])]
    tokenizer = train_tokenizer(texts, root / "tokenizer.model", vocab_size=1024, model_type="bpe")
    _write_sequences(root, text, tokenizer)
    recipe = ("--config=experiments/planted.py", f"--config.data.sequences={root / 'sequences'}")
    status, _, stderr = run_program("launch/train.py", *recipe, f"--workdir={workdir}")
    assert status == 0, stderr
    build_corpus([text / "known.jsonl"], tokenizer, database / "corpus", chunk_length=M)
    embed_corpus(Corpus(database / "corpus"), embedder, database / "embeddings")
    build_index(EmbeddingSet(database / "embeddings"), database / "index")
    return PlantedRun(text, workdir, database)


def _write_sequences(root: Path, text: Path, tokenizer: Tokenizer) -> None:
    for name in ("train", "register"):
        build_corpus([text / f"{name}.jsonl"], tokenizer, root / name, chunk_length=M)
    corpus, register = Corpus(root / "train"), Corpus(root / "register")
    entries = {}
    for number in range(register.num_documents):
        document = register.document(number)
        entries[document.metadata["title"]] = document.first_chunk
    rows = np.zeros(corpus.num_chunks, neighbour_dtype(1))
    documents = corpus.document_index(np.arange(corpus.num_chunks)).tolist()
    rows["ids"][:, 0] = [entries[corpus.document(number).metadata["title"]] for number in documents]
    inputs = {"corpus": corpus.fingerprint, "database": "register", "database_corpus": register.fingerprint}
    with Stage(root / "neighbours", "neighbours", settings={"k": 1, "filter": "document"}, inputs=inputs) as stage:
        with stage.shard(shard_name("neighbours", 0, 1, ".npy")) as (path, _), open(path, "wb") as file:
            np.save(file, rows)
        stage.finish({"chunks": corpus.num_chunks})
    write_sequences(corpus, NeighbourTable(root / "neighbours"), register, root / "sequences", length=2 * M, k=1)
