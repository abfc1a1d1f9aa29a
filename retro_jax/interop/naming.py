"""Which tensor of a Hugging Face checkpoint is which parameter of the decoder, and how one becomes the other.

A dense weight of torch is [out, in], ours [in, out]; heads are an axis of their own with us. GPT-2 keeps [in, out], and
query, key and value in one tensor.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from retro_jax.config import RetroConfig
from retro_jax.model.parameters import layer_shapes


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
      ours: its name in `retro_jax.model.parameters`.
      theirs: the tensor's, without the prefix of a model with a head.
      shape: ours.
      transposed: a dense weight of torch, [out, in].
      part: which third of the tensor's last axis, where it holds query, key and value.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    transposed: bool = False
    part: int | None = None

    @property
    def flat(self) -> tuple[int, ...]:
        """Our shape with heads and head size as one axis."""
        if len(self.shape) == 3:
            first, middle, last = self.shape
            return (first * middle, last) if self.ours.endswith("output") else (first, middle * last)
        return (int(np.prod(self.shape)),) if self.ours.endswith("_bias") else self.shape

    @property
    def their_shape(self) -> tuple[int, ...]:
        *lead, last = self.flat[::-1] if self.transposed else self.flat
        return (*lead, last * 3 if self.part is not None else last)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        if self.part is not None:
            tensor = np.split(tensor, 3, axis=-1)[self.part]
        return np.ascontiguousarray((tensor.T if self.transposed else tensor).reshape(self.shape))

    def to_theirs(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor, or its third."""
        flat = np.asarray(parameter).reshape(self.flat)
        return flat.T if self.transposed else flat


def entries(config: RetroConfig) -> list[Entry]:
    """Of every parameter of the decoder without chunked cross-attention, in the checkpoint's order."""
    config = dataclasses.replace(config, cca_layers=(), lora_rank=0)
    shapes = {name: tuple(leaf.shape) for name, leaf in layer_shapes(config).items()}
    names = dict(_gpt2(config) if config.positions == "learned" else _llama(config))
    unknown = set(shapes) ^ set(names)
    if unknown:
        raise ValueError(f"no such tensors in a Hugging Face checkpoint: {', '.join(sorted(unknown))}")
    return [
        Entry(ours, theirs, shapes[ours], config.positions != "learned" and _is_dense(ours), part)
        for ours, (theirs, part) in names.items()
    ]


def _is_dense(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("query", "key", "value", "output", "gate", "up", "down")


def _llama(config: RetroConfig) -> Iterator[tuple[str, tuple[str, int | None]]]:
    yield "embedding.table", ("embed_tokens.weight", None)
    biased = {"none": "", "qkv": "qkv", "all": "qkvo"}[config.attention_biases]
    for layer in range(1, config.num_layers + 1):
        ours, theirs = f"decoder.layers.{layer}", f"layers.{layer - 1}"
        yield f"{ours}.attention.norm.scale", (f"{theirs}.input_layernorm.weight", None)
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            yield f"{ours}.attention.{name}", (f"{theirs}.self_attn.{letter}_proj.weight", None)
            if letter in biased:
                yield f"{ours}.attention.{name}_bias", (f"{theirs}.self_attn.{letter}_proj.bias", None)
            if config.qk_norm and letter in "qk":
                yield f"{ours}.attention.{name}_norm.scale", (f"{theirs}.self_attn.{letter}_norm.weight", None)
        yield f"{ours}.ffw.norm.scale", (f"{theirs}.post_attention_layernorm.weight", None)
        for name in ("gate", "up", "down"):
            yield f"{ours}.ffw.{name}", (f"{theirs}.mlp.{name}_proj.weight", None)
            if config.ffw_biases:
                yield f"{ours}.ffw.{name}_bias", (f"{theirs}.mlp.{name}_proj.bias", None)
    yield "decoder.norm.scale", ("norm.weight", None)
    if not config.tie_embeddings:
        yield "head", ("lm_head.weight", None)


def _gpt2(config: RetroConfig) -> Iterator[tuple[str, tuple[str, int | None]]]:
    yield "embedding.table", ("wte.weight", None)
    yield "positions.table", ("wpe.weight", None)
    for layer in range(1, config.num_layers + 1):
        ours, theirs = f"decoder.layers.{layer}", f"h.{layer - 1}"
        yield f"{ours}.attention.norm.scale", (f"{theirs}.ln_1.weight", None)
        yield f"{ours}.attention.norm.bias", (f"{theirs}.ln_1.bias", None)
        for part, name in enumerate(("query", "key", "value")):
            yield f"{ours}.attention.{name}", (f"{theirs}.attn.c_attn.weight", part)
        for part, name in enumerate(("query", "key", "value")):
            yield f"{ours}.attention.{name}_bias", (f"{theirs}.attn.c_attn.bias", part)
        yield f"{ours}.attention.output", (f"{theirs}.attn.c_proj.weight", None)
        yield f"{ours}.attention.output_bias", (f"{theirs}.attn.c_proj.bias", None)
        yield f"{ours}.ffw.norm.scale", (f"{theirs}.ln_2.weight", None)
        yield f"{ours}.ffw.norm.bias", (f"{theirs}.ln_2.bias", None)
        for name, place in (("up", "c_fc"), ("down", "c_proj")):
            yield f"{ours}.ffw.{name}", (f"{theirs}.mlp.{place}.weight", None)
            yield f"{ours}.ffw.{name}_bias", (f"{theirs}.mlp.{place}.bias", None)
    yield "decoder.norm.scale", ("ln_f.weight", None)
    yield "decoder.norm.bias", ("ln_f.bias", None)
    if not config.tie_embeddings:
        yield "head", ("lm_head.weight", None)
