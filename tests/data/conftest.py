"""A tokenizer and corpora small enough to build in every run."""

import pytest
from sample_data import SAMPLE, write_jsonl

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [document.text for document in read_documents([SAMPLE])]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=1000)


@pytest.fixture(scope="session")
def corpora(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """(query corpus of 2 shards, database of 3 shards), chunks of 8 tokens; they share some groups."""
    root = tmp_path_factory.mktemp("corpora")
    documents = list(read_documents([SAMPLE]))

    def build(name: str, shards: int, step: int, characters: int) -> Corpus:
        chosen = documents[::step]
        paths = []
        for shard in range(shards):
            records = [
                {"id": f"{name}-{document.id}", "group": document.group, "text": document.text[: characters + 37 * i]}
                for i, document in enumerate(chosen[shard::shards])
            ]
            paths.append(write_jsonl(root / f"{name}-{shard}.jsonl", records))
        build_corpus(paths, tokenizer, root / name, chunk_length=8)
        return Corpus(root / name)

    return build("query", 2, 4, 90), build("database", 3, 2, 60)
