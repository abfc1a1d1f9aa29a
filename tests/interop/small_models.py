"""Small models with parameters drawn at random, and a tokenizer for them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small_run import SAMPLE
from tokenizers import Tokenizer as Json
from tokenizers import models, pre_tokenizers, trainers

from retro_jax.config import CheckpointConfig, DataConfig, RetroConfig, RopeScaling, TrainConfig
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import Tokenizer, train_tokenizer
from retro_jax.interop.pretrained import Pretrained
from retro_jax.model import abstract_parameters
from retro_jax.training.checkpoint import Checkpoints
from retro_jax.training.health import healthy
from retro_jax.training.state import TrainState
from retro_jax.training.workdir import CHECKPOINTS, open_workdir

RETRO = RetroConfig(
    vocab_size=290,
    width=16,
    num_layers=3,
    num_heads=3,
    head_size=4,
    ffw_width=20,
    chunk_length=4,
    neighbour_length=8,
    cca_layers=(2, 3),
    encoder_width=12,
    encoder_layers=1,
    encoder_num_heads=2,
    encoder_head_size=6,
    encoder_ffw_width=18,
)
LLAMA = dataclasses.replace(
    RETRO,
    positions="rope",
    ffw="swiglu",
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=False,
    norm_epsilon=1e-5,
    rope_scaling=RopeScaling("llama3", 8.0, 64),
)
QWEN = dataclasses.replace(LLAMA, attention_biases="qkv", rope_scaling=RopeScaling("yarn", 4.0, 32), window=5)
GPT_2 = dataclasses.replace(
    RETRO,
    num_heads=4,
    positions="learned",
    max_positions=16,
    norm="layer",
    attention_biases="all",
    ffw_biases=True,
)


def tokenizer(directory: Path) -> Tokenizer:
    text = "The retrieval database holds chunks of text, and what follows each of them.\n" * 20
    return train_tokenizer([text], directory / "given.model", vocab_size=290)


def byte_level_tokenizer(path: Path) -> Tokenizer:
    """GPT-2's kind of tokenizer, of 289 tokens, without one for padding."""
    given = Json(models.BPE())
    given.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=289, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    given.train_from_iterator([document.text for document in read_documents([SAMPLE])], trainer)
    path.write_text(given.to_str())
    return Tokenizer(path)


def pretrained(config: RetroConfig, given: Tokenizer | None = None, *, seed: int = 0, context: int = 12) -> Pretrained:
    generator = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(generator.normal(0, 0.5, leaf.shape), leaf.dtype)  # noqa: E731
    params = jax.tree.map(draw, abstract_parameters(config))
    return Pretrained(config, params, given, context, 0 if config.is_baseline else 2)


def write_run(workdir: Path, source: Pretrained) -> Path:
    """A run with this model as its checkpoint of step 1; `source` has a tokenizer."""
    data = DataConfig(sequences=("sequences",), length=source.context, neighbours=source.neighbours or 1)
    config = TrainConfig(model=source.config, data=data, init_from="base" if source.base_settings else "")
    base = {"init_from": "base", "model": {}, "settings": source.base_settings, "fingerprint": ""}
    open_workdir(workdir, config, source.tokenizer.path, base if source.base_settings else None)
    with Checkpoints(workdir / CHECKPOINTS, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, TrainState(jnp.zeros((), jnp.int32), source.params, (), healthy()), {})
    return workdir
