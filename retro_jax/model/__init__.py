"""The model: `Retro`, its sizes, and its parameters by name. Imports neither data nor retrieval."""

from retro_jax.model.parameters import (
    abstract_parameters,
    assemble,
    count_parameters,
    fill_layers,
    from_layers,
    layer_reader,
    layer_shapes,
    matrix_parameters,
    to_layers,
)
from retro_jax.model.presets import PRESETS, every_third, preset
from retro_jax.model.retro import Retro
from retro_jax.model.weights import logical_axes

__all__ = [
    "PRESETS",
    "Retro",
    "abstract_parameters",
    "assemble",
    "count_parameters",
    "every_third",
    "fill_layers",
    "from_layers",
    "layer_reader",
    "layer_shapes",
    "logical_axes",
    "matrix_parameters",
    "preset",
    "to_layers",
]
