"""An explorer of a tiny model with random weights, and its server in this process."""

from pathlib import Path

import jax
import pytest
from flax import nnx
from small_run import MODEL, SAMPLE, K, M
from tiny_explorer import Library, serving

from retro_jax.config import DataConfig, MeshConfig, TrainConfig
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import train_tokenizer
from retro_jax.explorer.app import create_app
from retro_jax.explorer.explorer import Explorer
from retro_jax.explorer.session import Limits, Session
from retro_jax.explorer.turns import Turns
from retro_jax.inference.decoding import Decoding
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import plan_model
from retro_jax.training.trained import TrainedRun


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Library:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [document.text[:3000] for document in read_documents([SAMPLE])]
    return Library(train_tokenizer(texts, path, vocab_size=MODEL.vocab_size))


@pytest.fixture(scope="session")
def make_explorer(library):
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    _, params = nnx.split(Retro(MODEL, rngs=nnx.Rngs(5)))
    params = jax.tree.map(lambda leaf: leaf * 4, params)
    config = TrainConfig(model=MODEL, data=DataConfig(length=8 * M, neighbours=K))
    run = TrainedRun(Path("runs/tiny"), config, library._tokenizer, mesh, plan_model(MODEL, mesh), params, 40)

    def make(**changes) -> Explorer:
        options = {"name": "database", "neighbours": K, "max_context": 8 * M, "limits": Limits(200, 64)}
        return Explorer(run, library, **options | changes)

    return make


@pytest.fixture(scope="session")
def explorer(make_explorer) -> Explorer:
    return make_explorer()


@pytest.fixture(scope="session")
def turns() -> Turns:
    return Turns(2)


@pytest.fixture(scope="session")
def port(explorer, turns):
    start = Session("Some words to begin with", 12, Decoding(seed=3))
    with serving(create_app(explorer, turns, start=start)) as port:
        yield port
