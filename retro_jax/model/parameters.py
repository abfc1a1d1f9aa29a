"""Parameters by name, one layer at a time, and how many there are.

The model stacks the parameters of equal layers (see `decoder.layer_plan`), and how depends on P. Export, import and
RETROfitting need names that do not: `decoder.layers.6.cca.query` is the query projection of CCA in the sixth layer.
Layers are counted from 1, as P is in the paper and in the configuration. The names:

    embedding.table  encoder_embedding.table  head
    decoder.layers.{1..}.attention|cca.{norm.scale, query, key, value, output, relative, content_bias, position_bias}
    decoder.layers.{1..}.ffw.{norm.scale, up, down}         decoder.norm.scale
    encoder.layers.{1..}.attention|ca|ffw.…                 encoder.layers.{1..}.ca.source_norm.scale
    encoder.norm.scale

and where the decoder is of another form (`RetroConfig.num_kv_heads` to `ffw_biases`)

    positions.table  decoder.layers.{1..}.attention.{query|key|value|output}_bias  …attention.{query|key}_norm.scale
    decoder.layers.{1..}.attention.{query|value}_lora.{down|up}
    decoder.layers.{1..}.ffw.gate  …ffw.{gate|up|down}_bias  …norm.bias
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import RetroConfig, did_you_mean
from retro_jax.errors import UserError
from retro_jax.model.decoder import layer_plan
from retro_jax.model.retro import Retro

Path = tuple[str | int, ...]


def abstract_parameters(config: RetroConfig) -> nnx.State:
    """The parameter state of `Retro(config)` with shapes and dtypes in the place of arrays; nothing is allocated."""
    return jax.eval_shape(lambda: nnx.state(Retro(config)))


def to_layers(params: nnx.State, config: RetroConfig) -> dict[str, Any]:
    """Stacked parameters to one entry per layer and parameter.

    Args:
      params: as `nnx.split(Retro(config))[1]`, or another state of that structure (gradients, averages).
      config: the model's.
    """
    flat = {}
    for path, param in nnx.to_flat_state(params):
        for name, index in _names(path, config):
            flat[name] = param[...] if index is None else param[index]
    return flat


def layer_reader(params: nnx.State, config: RetroConfig) -> Callable[[str], Any]:
    """Gives the array of a name of `to_layers`, taken out of its stack when it is asked for."""
    places = {name: (param, index) for path, param in nnx.to_flat_state(params) for name, index in _names(path, config)}

    def read(name: str) -> Any:
        param, index = places[name]
        return param[...] if index is None else param[index]

    return read


def layer_places(config: RetroConfig) -> dict[str, tuple[Path, int | None]]:
    """Of each name of `to_layers` the path of its array in the flat state, and the index along a stacked axis or None.

    In the order of `layer_shapes`: the names of one array follow one another.
    """
    paths = (path for path, _ in nnx.to_flat_state(abstract_parameters(config)))
    return {name: (path, index) for path in paths for name, index in _names(path, config)}


def layer_shapes(config: RetroConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of everything that `to_layers` gives for this configuration."""
    return dict(_layer_shapes(config))


@functools.lru_cache(16)  # to trace the model takes a while
def _layer_shapes(config: RetroConfig) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {}
    for path, param in nnx.to_flat_state(abstract_parameters(config)):
        for name, index in _names(path, config):
            shape = param.shape if index is None else param.shape[1:]
            shapes[name] = jax.ShapeDtypeStruct(shape, param.dtype)
    return shapes


def from_layers(flat: Mapping[str, Any], config: RetroConfig) -> nnx.State:
    """Inverse of `to_layers`: the state that `nnx.merge` and checkpoints take. NumPy arrays stay NumPy arrays.

    Raises:
      UserError: a name is missing or unknown, or a shape is not that of the configuration.
    """
    expected = layer_shapes(config)
    for name in flat:
        if name not in expected:
            raise UserError(f"parameter {name} is unknown to the configuration{did_you_mean(name, expected)}")
    for name, leaf in expected.items():
        if name not in flat:
            raise UserError(f"parameter {name} is missing; the configuration has {len(expected)} of them")
        if tuple(flat[name].shape) != leaf.shape:
            raise UserError(
                f"parameter {name} has shape {tuple(flat[name].shape)}, the configuration needs {leaf.shape}"
            )
    state = []
    for path, param in nnx.to_flat_state(abstract_parameters(config)):
        values = [flat[name] for name, _ in _names(path, config)]
        if param.axes[0] == "layers":
            stack = np.stack if all(isinstance(value, np.ndarray) for value in values) else jnp.stack
            state.append((path, param.replace(stack(values))))
        else:
            state.append((path, param.replace(values[0])))
    return nnx.from_flat_state(state)


def assemble(config: RetroConfig, read: Callable[[str], Any]) -> nnx.State:
    """The parameter state, made of one layer's parameter after the other: little more than the model is in memory.

    Args:
      config: the model's.
      read: gives the array of a name of `to_layers`; called once for each.

    Raises:
      UserError: an array has another shape than the configuration's.
    """
    state = []
    for path, param in nnx.to_flat_state(abstract_parameters(config)):
        state.append((path, param.replace(jnp.asarray(_gathered(path, param, config, read)))))
    return nnx.from_flat_state(state)


def fill_layers(params: nnx.State, config: RetroConfig, give: Callable[[str], Any]) -> nnx.State:
    """Parameters on the devices, made one array after the other where there are none yet.

    All layers of a kind follow each other, so that one who gives them out of other stacks needs one stack at a time.

    Args:
      params: arrays, and a `jax.ShapeDtypeStruct` with a sharding for each that is to be made; all processes of a run
        make the same call.
      config: the model's.
      give: the array of a name of `to_layers`; called once for each that is made.

    Raises:
      UserError: an array has another shape than the configuration's.
    """
    state = []
    for path, param in sorted(nnx.to_flat_state(params), key=lambda item: _kind(item[0], config)):
        wanted = param.get_value()
        if isinstance(wanted, jax.ShapeDtypeStruct):
            whole = _gathered(path, wanted, config, give)
            param = param.replace(jax.make_array_from_callback(whole.shape, wanted.sharding, whole.__getitem__))
        state.append((path, param))
    return nnx.from_flat_state(state)


def _gathered(path: Path, wanted: Any, config: RetroConfig, give: Callable[[str], Any]) -> np.ndarray:
    """The array at a path, of the shape and dtype of `wanted`, made of those of its layers."""
    whole = np.empty(wanted.shape, wanted.dtype)
    for name, index in _names(path, config):
        place, value = whole if index is None else whole[index], give(name)
        if value.shape != place.shape:
            raise UserError(f"parameter {name} has shape {value.shape}, the configuration needs {place.shape}")
        place[...] = value
    return whole


def _kind(path: Path, config: RetroConfig) -> str:
    """Name of the parameter without the number of its layer."""
    name, _ = next(_names(path, config))
    return re.sub(r"\d+", "", name)


def _names(path: Path, config: RetroConfig) -> Iterator[tuple[str, int | None]]:
    """(name, index along the stacked axis or None) of each layer's parameter that the array at `path` holds."""
    plan = layer_plan(config.num_layers, config.cca_layers)
    match path:
        case ("decoder", ("before" | "after") as part, int(segment), "blocks", int(place), *rest):
            run = getattr(plan, part)[segment]
            for repeat in range(run.repeats):
                layer = run.first + repeat * len(run.pattern) + place
                yield _join("decoder", "layers", layer, *rest), repeat
        case ("decoder", "entry", *rest):
            yield _join("decoder", "layers", plan.entry, *rest), None
        case ("encoder", "layers", int(index), *rest):
            yield _join("encoder", "layers", index + 1, *rest), None
        case _:
            yield _join(*path), None


def _join(*parts: str | int) -> str:
    return ".".join(str(part) for part in parts)


def count_parameters(config: RetroConfig) -> int:
    """All parameters, embeddings included."""
    return sum(math.prod(param.shape) for _, param in nnx.to_flat_state(abstract_parameters(config)))


def matrix_parameters(config: RetroConfig) -> dict[str, int]:
    """Parameters in weight matrices, without embeddings, output head, norms and biases (paper Table 2, spec 4.2).

    Returns:
      counts of "decoder" (self-attention and feed-forward), "cca" (all layers of P together), "encoder" (its
      self-attention and feed-forward), "ca_enc" (all layers of P_enc together) and their "total".
    """
    counts = dict.fromkeys(("decoder", "cca", "encoder", "ca_enc"), 0)
    for path, param in nnx.to_flat_state(abstract_parameters(config)):
        # A matrix maps from or to a residual stream; u and v ("heads", "head") and norm scales do not.
        axes = [axis for axis in param.axes if axis != "layers"]
        if len(axes) < 2 or "vocab" in axes or not {"embed", "encoder_embed"} & set(axes):
            continue
        part = "cca" if "cca" in path else "ca_enc" if "ca" in path else path[0]
        counts[part] += math.prod(param.shape)
    return {**counts, "total": sum(counts.values())}
