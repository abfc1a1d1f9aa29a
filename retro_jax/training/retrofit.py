"""RETROfit: a trained decoder gets an encoder and chunked cross-attention (paper section 4.2, appendix B.2).

The decoder stays as it is, so that RETRO[OFF] is the model it was, bit for bit; with `model.lora_rank` it gets a small
trained addition, which changes OFF as well. The output projections of the new
cross-attention begin at 0, so that the first step of RETRO[ON] is that model too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from retro_jax.config import RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.model.parameters import layer_shapes, replace_layers
from retro_jax.model.presets import every_third

# Settings of `RetroConfig` that say how the retrieval is, and how all is computed; the others are the decoder's.
RETRIEVAL = (
    "chunk_length",
    "neighbour_length",
    "cca_layers",
    "encoder_width",
    "encoder_layers",
    "encoder_num_heads",
    "encoder_head_size",
    "encoder_ffw_width",
    "encoder_ca_layers",
    "neighbour_part",
    "cross_positions",
    "share_embeddings",
)
_COMPUTATION = ("dtype", "remat", "scan_layers", "init_scale")


class Base(NamedTuple):
    """A trained model: what it is, and how to get at its parameters, by the names of `retro_jax.model.parameters`.

    Attributes:
      name: where it is, for messages.
      config: of the model.
      open: loads it and gives the reader of its parameters.
      tokenizers: fingerprints of its tokenizer's files, one of which data must be made with; none where nobody knows.
      settings: what it says of its context and special tokens, kept for exports of the run.
    """

    name: str
    config: RetroConfig
    open: Callable[[], Callable[[str], Any]]
    tokenizers: tuple[str, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})

    def check_tokenizer(self, fingerprint: str, owner: str) -> None:
        """Raises UserError when the data `owner` was made with another tokenizer than the model was trained with."""
        if self.tokenizers and fingerprint not in self.tokenizers:
            raise UserError(
                f"{owner} was made with tokenizer {fingerprint}, init_from {self.name} was trained with "
                f"{' or '.join(self.tokenizers)}; make the data with the tokenizer that lies there"
            )


def resolve(config: TrainConfig, base: RetroConfig) -> TrainConfig:
    """The run with the decoder of the model that it begins with.

    A baseline gets the retrieval that `config.model` describes, in every third layer from the sixth where it names
    none; with `cca_gate` 0 it gets none then, and is trained further as it is. A RETRO keeps its own, and is trained
    further.

    Raises:
      UserError: the model is too shallow for that rule.
    """
    own = RETRIEVAL + _COMPUTATION if base.is_baseline else _COMPUTATION
    changes = {name: getattr(config.model, name) for name in own}
    changes["lora_rank"] = base.lora_rank or config.model.lora_rank
    if base.is_baseline:
        changes["cca_layers"] = config.model.cca_layers or (every_third(base.num_layers) if config.cca_gate else ())
        if config.cca_gate and not changes["cca_layers"]:
            raise UserError(f"init_from: a model of {base.num_layers} layers has no sixth; give model.cca_layers")
    return dataclasses.replace(config, model=dataclasses.replace(base, **changes))


def trains(config: TrainConfig) -> Callable[[tuple[str, ...]], bool] | None:
    """Of the path of a parameter, whether the run trains it; None where it trains all."""
    if not config.cca_gate:
        return lambda path: not _is_retrieval(path)
    return _is_added if config.init_from and not config.unfreeze_decoder else None


def begin(params: nnx.State, config: TrainConfig, base: Base) -> nnx.State:
    """Fresh parameters of the run's model with those of the base in their places.

    Args:
      params: as `initialise` makes them, on the devices.
      config: the run, resolved.
      base: the model that it begins with.

    Raises:
      UserError: the base is damaged, or the encoder cannot begin with its embedding.
    """
    model, read = config.model, base.open()
    there, shapes = layer_shapes(base.config), layer_shapes(model)
    copies = config.encoder_embedding == "decoder" and "encoder_embedding.table" in shapes
    if copies and model.encoder_width != model.width:
        raise UserError(
            f"encoder_embedding 'decoder' needs model.encoder_width {model.width}, that of {base.name}; "
            f"it is {model.encoder_width}"
        )

    def give(name: str) -> Any | None:
        if name in there:
            return read(name)
        if name.endswith(".cca.output"):
            return jnp.zeros(shapes[name].shape, shapes[name].dtype)
        return read("embedding.table") if copies and name == "encoder_embedding.table" else None

    return replace_layers(params, model, give)


def _is_added(path: tuple[str, ...]) -> bool:
    return _is_retrieval(path) or any(name.endswith("_lora") for name in path)


def _is_retrieval(path: tuple[str, ...]) -> bool:
    return path[0] in ("encoder", "encoder_embedding") or "cca" in path
