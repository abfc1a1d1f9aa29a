"""The small layers every block is made of: norms, feed-forward, token embedding; and what a backward pass keeps."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import RetroConfig
from retro_jax.model.weights import (
    Stream,
    compute_dtype,
    linear,
    normal,
    plus,
    residual_scale,
    statistics_dtype,
    weight,
    zeros,
)
from retro_jax.parallel import rules


class Form(NamedTuple):
    """What a block is made of where it is not the paper's: fields of `RetroConfig` with the same names.

    Attributes:
      kv_heads: heads of keys and values; 0 for as many as of queries.
    """

    norm: str = "rms"
    kv_heads: int = 0
    qk_norm: bool = False
    window: int = 0
    attention_biases: str = "none"
    ffw: str = "gelu"
    ffw_biases: bool = False
    lora_rank: int = 0


PAPER = Form()


def decoder_form(config: RetroConfig) -> Form:
    """Of the decoder's blocks, without chunked cross-attention, which is the paper's."""
    return Form(**{name: getattr(config, name) for name in Form._fields})


def remat(config: RetroConfig, function: Callable[..., Any], *, scanned: bool = False) -> Callable[..., Any]:
    """A block that computes in the backward pass again what `config.remat` says.

    With "none" a mesh with fsdp still gathers the weights again, for keeping them would undo the split.

    Args:
      config: the model's.
      function: of arrays to arrays.
      scanned: the body of a scan, where nothing can be merged with the forward pass and no barrier against that is
        needed.
    """
    policies = jax.checkpoint_policies
    if config.remat == "none":
        if rules.axis_size("fsdp") == 1:
            return function
        policy = policies.save_anything_except_these_names("weight")
    elif config.remat == "block":
        policy = policies.nothing_saveable
    else:
        policy = policies.save_only_these_names(*config.remat.split(","))
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, without bias (paper section 2.5); statistics in float32."""

    def __init__(self, config: RetroConfig, stream: Stream):
        self.epsilon = config.norm_epsilon
        self.statistics = statistics_dtype(config)
        self.scale = nnx.Param(jnp.ones((stream.width,), self.statistics), axes=(stream.axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D], dtype kept."""
        return normalise(x, self.scale[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalise(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in scale's dtype: [..., D] to [..., D] in x's dtype."""
    return _normalise(x, scale, epsilon)[0]


def _normalise(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = x.astype(scale.dtype)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return (y * inverse_rms * scale).astype(x.dtype), (x, inverse_rms, scale)


def _normalise_backward(_: float, saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    # By hand, so that the input and one number a row are all that is kept.
    x, inverse_rms, scale = saved
    unit = x.astype(scale.dtype) * inverse_rms
    cotangent = cotangent.astype(scale.dtype)
    scaled = cotangent * scale
    along = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    gradient = (inverse_rms * (scaled - unit * along)).astype(x.dtype)
    # The sum over all tokens as a product with ones: on a CPU a reduction of the leading axes is slow.
    tokens = tuple(range(x.ndim - 1))
    ones = jnp.ones(x.shape[:-1], scale.dtype)
    return gradient, jax.lax.dot_general(ones, cotangent * unit, ((tokens, tokens), ((), ())))


normalise.defvjp(_normalise, _normalise_backward)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in GPT-2's form, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return _gelu_and_slope(x)[0]


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    # By hand, so that the backward pass keeps one array, the slope, and computes no second tanh.
    value, slope = _gelu_and_slope(*primals)
    return value, slope * tangents[0]


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    bend = jnp.tanh(scale * x * (1 + cubic * square))
    slope = 0.5 * (1 + bend) + 0.5 * x * (1 - bend * bend) * scale * (1 + 3 * cubic * square)
    return 0.5 * x * (1 + bend), slope


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last axis (GPT-2); statistics in float32."""

    def __init__(self, config: RetroConfig, stream: Stream):
        self.epsilon = config.norm_epsilon
        dtype = statistics_dtype(config)
        self.scale = nnx.Param(jnp.ones((stream.width,), dtype), axes=(stream.axis,))
        self.bias = zeros((stream.width,), (stream.axis,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D], dtype kept."""
        y = x.astype(self.scale.dtype)
        y = y - y.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * inverse * self.scale[...] + self.bias[...]).astype(x.dtype)


def norm_of(form: Form, config: RetroConfig, stream: Stream) -> RMSNorm | LayerNorm:
    """The norm that a block of this form has before each of its parts."""
    return (RMSNorm if form.norm == "rms" else LayerNorm)(config, stream)


class FeedForward(nnx.Module):
    """FFW of paper section 2.4: x + down(gelu(up(norm(x)))), not gated, without biases.

    As "swiglu" (Shazeer 2020) it is x + down(silu(gate(y)) * up(y)) with y = norm(x).
    """

    def __init__(
        self,
        config: RetroConfig,
        stream: Stream,
        hidden: int,
        num_layers: int,
        key: jax.Array,
        form: Form = PAPER,
    ):
        dtype = statistics_dtype(config)
        up, down = jax.random.split(key)
        self.norm = norm_of(form, config, stream)
        self.up = normal(up, (stream.width, hidden), (stream.axis, "ffw"), config.init_scale, dtype)
        self.down = normal(
            down, (hidden, stream.width), ("ffw", stream.axis), residual_scale(config, num_layers), dtype
        )

        gated = form.ffw == "swiglu"
        gate, inner = jax.random.fold_in(key, 2), (stream.axis, "ffw")
        self.gate = normal(gate, (stream.width, hidden), inner, config.init_scale, dtype) if gated else None
        self.gate_bias = zeros((hidden,), ("ffw",), dtype) if gated and form.ffw_biases else None
        self.up_bias = zeros((hidden,), ("ffw",), dtype) if form.ffw_biases else None
        self.down_bias = zeros((stream.width,), (stream.axis,), dtype) if form.ffw_biases else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        y = self.norm(x)
        hidden = checkpoint_name(plus(linear(y, weight(self.up, x.dtype)), self.up_bias), "hidden")
        if self.gate is None:
            hidden = gelu(hidden)
        else:
            gate = checkpoint_name(plus(linear(y, weight(self.gate, x.dtype)), self.gate_bias), "hidden")
            hidden = jax.nn.silu(gate) * hidden
        added = plus(linear(hidden, weight(self.down, x.dtype)), self.down_bias)
        return x + checkpoint_name(added, "added")


class Embedding(nnx.Module):
    """Token embedding table [V, D]."""

    def __init__(self, config: RetroConfig, stream: Stream, key: jax.Array):
        self.dtype = compute_dtype(config)
        self.pad_id = config.pad_id
        shape = (config.vocab_size, stream.width)
        self.table = normal(key, shape, ("vocab", stream.axis), config.init_scale, statistics_dtype(config))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[...] int32 to [..., D]; an id beyond the vocabulary gives NaN, so that it cannot pass unnoticed. PAD is the
        one exception: where it has no row of its own it takes the first, which nothing sees."""
        table = self.table[...]
        if self.pad_id == table.shape[0]:
            tokens = jnp.where(tokens == self.pad_id, 0, tokens)
        if rules.axis_size("fsdp") == 1 or table.shape[1] % rules.axis_size("fsdp"):
            return jnp.take(table, tokens, axis=0, mode="fill").astype(self.dtype)
        # Each device looks up its part of the width for all rows of its fsdp group, and then rows and widths change
        # places: that moves the activations once, where gathering the table (and summing its gradient) would move V
        # rows, most of them unused.
        inner = (None,) * (tokens.ndim - 2)
        tokens = rules.constrain(tokens, "examples", "tokens", *inner)
        rows = jnp.take(table, tokens, axis=0, mode="fill").astype(self.dtype)
        rows = rules.constrain(rows, "examples", "tokens", *inner, "width")
        return rules.constrain(rows, "batch", "tokens", *inner, None)
