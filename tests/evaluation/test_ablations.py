"""Every ablation of the paper's table 13 can be evaluated, with and without retrieval."""

import dataclasses
import runpy

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import ROOT, VOCAB, M

from retro_jax.config import MeshConfig, TrainConfig, from_config_dict
from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import document_scores
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import scored_spans
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.training.state import plan_model

RECIPE = runpy.run_path(str(ROOT / "experiments" / "ablations.py"))
# What is computed otherwise, in two models; the other ablations differ in numbers of layers or neighbours alone.
TOGETHER = {
    "the neighbour alone": ("no-query-conditioning", "shared-embeddings", "neighbour-only"),
    "the continuation alone": ("no-cross-positions", "continuation-only"),
}
SMALL = {
    "vocab_size": VOCAB,
    "width": 16,
    "num_heads": 1,
    "head_size": 8,
    "ffw_width": 16,
    "chunk_length": M,
    "neighbour_length": 2 * M,
    "encoder_width": 16,
    "encoder_num_heads": 1,
    "encoder_head_size": 8,
    "encoder_ffw_width": 16,
    "dtype": "float32",
    "remat": "none",
}


def evaluate(name, small_data, **changes):
    """bpb of a small model with what is changed in an ablation: OFF and ON."""
    recipe = from_config_dict(TrainConfig, RECIPE["get_config"](name))
    config = dataclasses.replace(recipe.model, **SMALL, **changes)
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    _, params = nnx.split(Retro(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf * 8.0, params)
    forward = Forward(plan_model(config, mesh), params, mesh, batch_size=8)
    corpus = Corpus(small_data.corpus)
    table, database = NeighbourTable(small_data.neighbours), Corpus(small_data.database / "corpus")
    scores = []
    for neighbourhood in (None, Neighbourhood(table, database, recipe.data.neighbours)):
        spans = scored_spans(forward, corpus, window=4 * M, stride=2 * M, neighbourhood=neighbourhood)
        scores.append(document_scores(collect(corpus, spans)).total())
    return scores


def check(name, small_data, **changes):
    off, on = evaluate(name, small_data, **changes)
    assert on.bytes == off.bytes and np.isfinite([on.nats, off.nats]).all()
    assert on.nats != off.nats


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER.keys())
def test_what_ablations_change_can_be_evaluated(names, small_data):
    changes = {key: value for name in names for key, value in RECIPE["MODELS"][name].items()}
    check("default", small_data, **{"encoder_layers": 1, **changes, "num_layers": 1, "cca_layers": (1,)})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPE["MODELS"] if name != "no-retrieval"])
def test_every_ablation_can_be_evaluated(name, small_data):
    check(name, small_data)


def test_the_ablation_without_retrieval_is_a_baseline_that_takes_no_neighbours(small_data):
    with pytest.raises(UserError, match="takes no neighbours"):
        evaluate("no-retrieval", small_data, num_layers=1)
