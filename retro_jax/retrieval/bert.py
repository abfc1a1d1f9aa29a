"""BERT in Flax NNX, for the frozen embedder: any Hugging Face `BertModel` checkpoint in safetensors form.

Axis letters: B batch, T word pieces, E width, N heads, H head size, V vocabulary. Weights of equal layers are stacked
on a leading axis and scanned, so compile time does not grow with depth; query, key and value are one product.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from retro_jax.errors import UserError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),  # jax.nn.gelu takes erfc: three times as long on a CPU
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
_WEIGHTS = "model.safetensors"
_MASKED = -1e30  # added to the logit of a padded key; finite, so that a row of padding alone stays finite
_PRECISION = jax.lax.Precision.HIGHEST  # the same vectors on TPU, GPU and CPU: a database and its queries must agree


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, named as in its config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "BertConfig":
        """Reads config.json.

        Raises:
          UserError: no such file, not JSON, a size missing, or an architecture that is not BERT's.
        """
        path = Path(directory) / "config.json"
        values = read_json(path)
        if (kind := values.get("model_type", "bert")) != "bert":
            raise UserError(f"{path}: model_type {kind!r} is not a BERT; choose an embedder with model_type 'bert'")
        if (positions := values.get("position_embedding_type", "absolute")) != "absolute":
            raise UserError(f"{path}: position_embedding_type {positions!r} is not supported, only 'absolute'")
        if values.get("is_decoder"):
            raise UserError(f"{path}: is_decoder is set; the embedder must be an encoder")
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        try:
            config = cls(**known)
        except TypeError as error:
            raise UserError(f"{path}: {str(error).replace('BertConfig.__init__() ', '')}") from None
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(f"{path}: hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{path}: hidden_size {config.hidden_size} is no multiple of the {config.num_attention_heads} heads"
            )
        return config


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; `shape` has the stacked layers in front of it."""

    def __init__(self, shape: tuple[int, ...], epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]


class Dense(nnx.Module):
    """Affine map of the last axis; `layers` copies are stacked in front.

    Products are of the kernel's type, which may be made bfloat16, with sums in float32.
    """

    def __init__(self, layers: int, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(0.02 * rngs.params.normal((layers, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((layers, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        return _product("...e,ef->...f", x, kernel, kernel.dtype) + self.bias[...]


def _product(equation: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """An einsum of operands in `dtype`, summed in float32."""
    operands = (x.astype(dtype), y.astype(dtype))
    return jnp.einsum(equation, *operands, precision=_PRECISION, preferred_element_type=jnp.float32)


class BertLayers(nnx.Module):
    """All encoder blocks: every parameter has the layer as its first axis, and `__call__` is one block of them.

    Post-norm: x = LN(x + attention(x)); x = LN(x + feed_forward(x)).
    """

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        layers, width, hidden = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        self.query_key_value = Dense(layers, width, 3 * width, rngs)
        self.attention_output = Dense(layers, width, width, rngs)
        self.attention_norm = LayerNorm((layers, width), config.layer_norm_eps)
        self.feed_forward_in = Dense(layers, width, hidden, rngs)
        self.feed_forward_out = Dense(layers, hidden, width, rngs)
        self.output_norm = LayerNorm((layers, width), config.layer_norm_eps)

    def __call__(self, x: jax.Array, key_bias: jax.Array) -> jax.Array:
        """One block on x [B, T, E]; `key_bias` [B, 1, 1, T] is added to the attention logits."""
        b, t, width = x.shape
        heads = self.config.num_attention_heads
        dtype = self.query_key_value.kernel[...].dtype
        q, k, v = jnp.moveaxis(self.query_key_value(x).reshape(b, t, 3, heads, width // heads), 2, 0)
        logits = _product("btnh,bsnh->bnts", q * (width // heads) ** -0.5, k, dtype)
        weights = jax.nn.softmax(logits + key_bias, axis=-1)
        mixed = _product("bnts,bsnh->btnh", weights, v, dtype).reshape(b, t, width)
        x = self.attention_norm(x + self.attention_output(mixed))
        inner = ACTIVATIONS[self.config.hidden_act](self.feed_forward_in(x))
        return self.output_norm(x + self.feed_forward_out(inner))


class Bert(nnx.Module):
    """`Bert(config, rngs=nnx.Rngs(0))(tokens, mask)` gives the last hidden states. No pooler, no dropout (frozen)."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.hidden_size
        self.word_embedding = nnx.Param(0.02 * rngs.params.normal((config.vocab_size, width)))
        self.position_embedding = nnx.Param(0.02 * rngs.params.normal((config.max_position_embeddings, width)))
        self.type_embedding = nnx.Param(0.02 * rngs.params.normal((config.type_vocab_size, width)))
        self.embedding_norm = LayerNorm((width,), config.layer_norm_eps)
        self.layers = BertLayers(config, rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Last hidden states.

        Args:
          tokens: word piece ids [B, T] int32, all of the first token type; T <= max_position_embeddings.
          mask: [B, T] bool, False at padding, which is never attended to.

        Returns:
          [B, T, E] float32; rows at padding hold no meaning.
        """
        x = self.word_embedding[...][tokens] + self.position_embedding[...][: tokens.shape[1]] + self.type_embedding[0]
        x = self.embedding_norm(x)
        key_bias = jnp.where(mask, 0.0, _MASKED)[:, None, None, :]
        graph, stacked = nnx.split(self.layers)

        def block(x: jax.Array, parameters: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, parameters)(x, key_bias), None

        # A loop over layers copies each layer's weights before it multiplies by them: a fifth of the time of a CPU.
        return jax.lax.scan(block, x, stacked, unroll=jax.default_backend() == "cpu")[0]


def load_bert(directory: str | os.PathLike) -> Bert:
    """Loads config.json and model.safetensors of a Hugging Face BERT checkpoint directory.

    Tensor names may carry the prefix "bert."; pooler, language-model head and position_ids are ignored; any float type
    becomes float32.

    Raises:
      UserError: file missing or damaged, unsupported architecture, or a tensor that is missing or of another shape.
    """
    config = BertConfig.load(directory)
    path = Path(directory) / _WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; only safetensors checkpoints are read (pickled .bin ones can carry code)"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            values = _assemble(config, _Tensors(path, file))
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    abstract = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    leaves = {}
    for location, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state)):
        name = ".".join(str(entry.key) for entry in location)
        if values[name].shape != leaf.shape:
            raise UserError(f"{path}: {name} is {values[name].shape}, config.json says {leaf.shape}")
        leaves[location] = values[name]
    pure = jax.tree_util.tree_map_with_path(lambda location, _: jnp.asarray(leaves[location]), nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint directory; missing or unreadable is a `UserError` naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; the embedder must be a Hugging Face BERT checkpoint directory"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


class _Tensors(Mapping):
    """The tensors of an open safetensors file by BERT name, as float32 and of the expected shape."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._names = {name.removeprefix("bert."): name for name in file.keys()}  # noqa: SIM118 (not a dict)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise UserError(f"{self._path}: tensor {name!r} is missing, so this is not the BERT config.json describes")
        return np.asarray(self._file.get_tensor(self._names[name])).astype(np.float32)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def expect(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = self[name]
        if tensor.shape != shape:
            raise UserError(f"{self._path}: tensor {name!r} has shape {tensor.shape}, config.json says {shape}")
        return tensor


def _assemble(config: BertConfig, tensors: _Tensors) -> dict[str, np.ndarray]:
    """Our parameter name -> array: torch keeps a dense weight as [out, in], so every one is transposed."""
    width, hidden = config.hidden_size, config.intermediate_size

    def norm(theirs: str, ours: str) -> dict[str, np.ndarray]:
        return {
            f"{ours}.scale": tensors.expect(f"{theirs}.weight", (width,)),
            f"{ours}.bias": tensors.expect(f"{theirs}.bias", (width,)),
        }

    def dense(theirs: tuple[str, ...], ours: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        kernels = [tensors.expect(f"{name}.weight", (outputs, inputs)).T for name in theirs]
        biases = [tensors.expect(f"{name}.bias", (outputs,)) for name in theirs]
        return {f"{ours}.kernel": np.concatenate(kernels, axis=1), f"{ours}.bias": np.concatenate(biases)}

    layers = []
    for i in range(config.num_hidden_layers):
        at = f"encoder.layer.{i}"
        projections = tuple(f"{at}.attention.self.{name}" for name in ("query", "key", "value"))
        layers.append(
            dense(projections, "query_key_value", width, width)
            | dense((f"{at}.attention.output.dense",), "attention_output", width, width)
            | norm(f"{at}.attention.output.LayerNorm", "attention_norm")
            | dense((f"{at}.intermediate.dense",), "feed_forward_in", width, hidden)
            | dense((f"{at}.output.dense",), "feed_forward_out", hidden, width)
            | norm(f"{at}.output.LayerNorm", "output_norm")
        )
    word, position, kind = (
        tensors.expect(f"embeddings.{name}_embeddings.weight", (rows, width))
        for name, rows in (
            ("word", config.vocab_size),
            ("position", config.max_position_embeddings),
            ("token_type", config.type_vocab_size),
        )
    )
    return {
        "word_embedding": word,
        "position_embedding": position,
        "type_embedding": kind,
        **norm("embeddings.LayerNorm", "embedding_norm"),
        **{f"layers.{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]},
    }
