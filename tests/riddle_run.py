"""A RETRO that answers riddles, trained in the time of a test: seven words, and an answer that a database alone has.

The words fill a chunk, the answer is the continuation of the same words in the database. So whoever retrieves them can
answer, and who does not can only guess. An answer has six words, of which the tests ask for the first, one of sixteen:
the others are there for the training, which has so much more to copy.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from small_run import MODEL, RECIPE, run_program

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.sequences import write_sequences
from retro_jax.data.stage import Stage, shard_name
from retro_jax.data.tokenizer import Tokenizer, train_tokenizer
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.neighbours import NeighbourTable, neighbour_dtype

WORDS = "ant bee cat dog elk fox gnu hen ibis jay kite lynx mole newt owl pig rat swan toad wasp"
ANSWERS = "Amber Brass Coral Denim Ebony Flint Gold Honey Ivory Jade Khaki Lemon Mint Navy Olive Pearl"
M = 8
VOCAB = 460  # enough for every word to be one token


@dataclasses.dataclass(frozen=True)
class Riddle:
    """Seven words and their answer, of which `answer` is the first word."""

    words: str
    whole_answer: str

    @property
    def answer(self) -> str:
        return self.whole_answer.split()[0]

    @property
    def document(self) -> dict[str, str]:
        return {"id": self.words, "text": f"{self.words} {self.whole_answer}."}


@dataclasses.dataclass(frozen=True)
class RiddleRun:
    """The workdir of a trained run, a database with the answers of `known` riddles, and `late` ones that it lacks."""

    workdir: Path
    database: Path
    known: list[Riddle]
    late: list[Riddle]


def make_riddles(count: int, seed: int) -> list[Riddle]:
    generator = np.random.default_rng(seed)
    draw = lambda words, size: " ".join(generator.choice(words.split(), size))  # noqa: E731
    return [Riddle(draw(WORDS, M - 1), draw(ANSWERS, M - 2)) for _ in range(count)]


def write_documents(path: Path, riddles: list[Riddle]) -> Path:
    path.write_text("".join(json.dumps(riddle.document) + "\n" for riddle in riddles))
    return path


def make_riddle_run(root: Path, embedder: Embedder) -> RiddleRun:
    """Trains on riddles that nobody asks later, each with its own document as neighbour, which a search would find."""
    riddles = make_riddles(1500, seed=0)
    tokenizer = train_tokenizer(
        [riddle.document["text"] for riddle in riddles], root / "tokenizer.model", vocab_size=VOCAB, model_type="bpe"
    )
    _write_sequences(root, riddles, tokenizer)
    model = dataclasses.replace(
        MODEL,
        vocab_size=VOCAB,
        width=32,
        num_heads=4,
        encoder_width=32,
        encoder_num_heads=4,
        encoder_ca_layers=(),
        share_embeddings=True,
        init_scale=0.2,
    )
    recipe, workdir = root / "riddles.py", root / "run"
    recipe.write_text(RECIPE.format(model=dataclasses.asdict(model), sequences=str(root / "sequences")))
    flags = ("--config.steps=150", "--config.batch_size=64", "--config.data.neighbours=1", "--config.log_every=50")
    status, _, stderr = run_program("launch/train.py", f"--config={recipe}", f"--workdir={workdir}", *flags)
    assert status == 0, stderr
    known, late = make_riddles(48, seed=1), make_riddles(16, seed=2)
    database = root / "database"
    build_corpus([write_documents(root / "known.jsonl", known)], tokenizer, database / "corpus", chunk_length=M)
    embed_corpus(Corpus(database / "corpus"), embedder, database / "embeddings")
    build_index(EmbeddingSet(database / "embeddings"), database / "index")
    return RiddleRun(workdir, database, known, late)


def _write_sequences(root: Path, riddles: list[Riddle], tokenizer: Tokenizer) -> None:
    """The same texts as queries and as database, under other names, since no document is a neighbour of its own."""
    named = [riddle.document | {"id": f"answer to {riddle.words}"} for riddle in riddles]
    (root / "answers.jsonl").write_text("".join(json.dumps(document) + "\n" for document in named))
    texts = {"train": write_documents(root / "train.jsonl", riddles), "answers": root / "answers.jsonl"}
    corpora = {name: root / name for name in texts}
    for name, text in texts.items():
        build_corpus([text], tokenizer, corpora[name], chunk_length=M)
    corpus, database = Corpus(corpora["train"]), Corpus(corpora["answers"])
    rows = np.zeros(corpus.num_chunks, neighbour_dtype(1))
    documents = database.document_index(np.arange(corpus.num_chunks)).tolist()
    rows["ids"][:, 0] = [database.document(number).first_chunk for number in documents]
    inputs = {"corpus": corpus.fingerprint, "database": "riddles", "database_corpus": database.fingerprint}
    with Stage(root / "neighbours", "neighbours", settings={"k": 1, "filter": "document"}, inputs=inputs) as stage:
        with stage.shard(shard_name("neighbours", 0, 1, ".npy")) as (path, _), open(path, "wb") as file:
            np.save(file, rows)
        stage.finish({"chunks": corpus.num_chunks})
    write_sequences(corpus, NeighbourTable(root / "neighbours"), database, root / "sequences", length=2 * M, k=1)
