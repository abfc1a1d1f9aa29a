"""The model: `Retro`, its sizes, and its parameters by name. Imports neither data nor retrieval."""

from retro_jax.model.layers import logical_axes
from retro_jax.model.presets import PRESETS, preset
from retro_jax.model.retro import Retro

__all__ = ["PRESETS", "Retro", "logical_axes", "preset"]
