import pytest
from tiny_bert import write_tiny_bert


@pytest.fixture(scope="session")
def database(small_data, tmp_path_factory):
    """The small database made searchable with a random BERT; gives (database, embedder)."""
    from retro_jax.data.corpus import Corpus
    from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
    from retro_jax.retrieval.index_build import build_index

    bert = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    embedder = Embedder.load(bert, normalize=False, max_length=32)
    embed_corpus(Corpus(small_data.database / "corpus"), embedder, small_data.database / "embeddings")
    build_index(EmbeddingSet(small_data.database / "embeddings"), small_data.database / "index")
    return small_data.database, bert
