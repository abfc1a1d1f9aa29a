"""A model of random weights over small data, and contexts to make methods from."""

import dataclasses

import jax
import pytest
from flax import nnx
from small_run import MODEL, M

from retro_jax.config import MeshConfig, TrainConfig
from retro_jax.data.corpus import Corpus
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.methods import MethodContext, MethodOptions
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.retrieval.segments import DatabaseCorpus
from retro_jax.training.state import plan_model
from retro_jax.training.trained import TrainedRun


def random_run(model, corpus: Corpus, scale: float = 8.0) -> TrainedRun:
    """A run that was never trained, with weights so large that its predictions depend on what it reads."""
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    plan = plan_model(model, mesh)
    _, params = nnx.split(Retro(model, rngs=nnx.Rngs(3)))
    params = jax.device_put(
        jax.tree.map(lambda leaf: leaf * scale, params), jax.tree.map(lambda leaf: leaf.sharding, plan.params)
    )
    return TrainedRun(corpus.directory, TrainConfig(model=model), corpus.tokenizer, mesh, plan, params, 0)


@pytest.fixture(scope="session")
def valid(small_data) -> Evaluated:
    """What is scored, with its neighbours."""
    table, database = NeighbourTable(small_data.neighbours), DatabaseCorpus(small_data.database)
    return Evaluated("valid", Corpus(small_data.corpus), table, database)


@pytest.fixture(scope="session")
def database_as_set(small_data) -> Evaluated:
    """The database's own documents, to be scored."""
    return Evaluated("database", Corpus(small_data.database / "corpus"), None, None)


@pytest.fixture(scope="session")
def make_run(valid):
    """`make_run(**changes)`: a run of a random model with the small configuration, changed."""
    return lambda **changes: random_run(dataclasses.replace(MODEL, **changes), valid.corpus)


@pytest.fixture(scope="session")
def baseline(make_run) -> TrainedRun:
    return make_run(cca_layers=())


@pytest.fixture(scope="session")
def retro(make_run) -> TrainedRun:
    return make_run()


@pytest.fixture(scope="session")
def shared_work(tmp_path_factory):
    """Where methods of the same baseline keep their datastore."""
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="session")
def make_context(small_data, baseline, shared_work):
    """`make_context(run=, tuning=, work=, batch_size=, k=, **options)`."""

    kept = {}  # a context compiles its programs once

    def make(run=None, *, tuning=None, work=None, batch_size=8, k=2, window=4 * M, stride=2 * M, **options):
        key = (id(run), id(tuning), work, batch_size, k, window, stride, *options.items())
        if key not in kept:
            kept[key] = MethodContext(
                run=run or baseline,
                window=window,
                stride=stride,
                batch_size=batch_size,
                k=k,
                database=small_data.database,
                work=work or shared_work,
                tuning=tuning,
                options=MethodOptions(**options),
            )
        return kept[key]

    return make
