"""Small models and inputs for the model's tests: random parameters everywhere, jitted functions shared by all tests."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from retro_jax.config import RetroConfig, RopeScaling
from retro_jax.model import Retro, abstract_parameters

SMALL = RetroConfig(
    vocab_size=23,
    width=16,
    num_layers=4,
    num_heads=3,
    head_size=4,  # N * H is not D
    ffw_width=20,
    chunk_length=4,
    neighbour_length=8,
    cca_layers=(2, 4),
    encoder_width=12,
    encoder_layers=2,
    encoder_num_heads=2,
    encoder_head_size=6,
    encoder_ffw_width=18,
    dtype="float64",
)

# Decoders as other models have them.
_TWO = dataclasses.replace(SMALL, num_layers=2, cca_layers=(2,), encoder_layers=1, pad_id=SMALL.vocab_size)
_LLAMA = dataclasses.replace(_TWO, positions="rope", ffw="swiglu", num_heads=4, num_kv_heads=2, tie_embeddings=False)
BLOCKS = {
    "llama": dataclasses.replace(_LLAMA, rope_scaling=RopeScaling("llama3", 8.0, 64)),
    "mistral and qwen": dataclasses.replace(
        _LLAMA, window=3, qk_norm=True, lora_rank=2, attention_biases="qkv", rope_scaling=RopeScaling("yarn", 4.0, 32)
    ),
    "gpt-2": dataclasses.replace(
        _TWO, positions="learned", max_positions=24, norm="layer", attention_biases="all", ffw_biases=True
    ),
}


# Compiling dominates these tests; what the compiler's optimiser does is not their subject.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_parameters(config, seed=0):
    """Every parameter drawn at random, biases and norms too: what is zero or one at the start hides mistakes."""
    generator = np.random.default_rng(seed)
    draw = lambda leaf: generator.normal(0, 1 / np.sqrt(max(leaf.shape[0], 4)), leaf.shape).astype(leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract_parameters(config))


@functools.cache
def graph(config):
    """The structure to merge parameters into."""
    graphdef = None

    def build():
        nonlocal graphdef
        graphdef, params = nnx.split(Retro(config))
        return params

    jax.eval_shape(build)
    return graphdef


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _logits(graphdef, params, tokens, neighbours):
    return nnx.merge(graphdef, params)(tokens, neighbours)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _encode(graphdef, params, tokens, neighbours):
    return nnx.merge(graphdef, params).encode(tokens, neighbours).values


def logits(config, params, tokens, neighbours=None):
    return np.asarray(_logits(graph(config), params, tokens, neighbours))


def encode(config, params, tokens, neighbours):
    """E [B, L, K, R, E]."""
    return np.asarray(_encode(graph(config), params, tokens, neighbours))


def inputs(config, *, batch=2, length=14, k=2, r=None, seed=0):
    """Tokens [B, T] and neighbours [B, T // M, K, R] without PAD."""
    generator = np.random.default_rng(seed)
    shape = (batch, length // config.chunk_length, k, r or config.neighbour_length)
    return (
        generator.integers(1, config.vocab_size, (batch, length), dtype=np.int32),
        generator.integers(1, config.vocab_size, shape, dtype=np.int32),
    )
