"""retro_jax: the retrieval-enhanced transformer RETRO in JAX and Flax.

`Retro` and `RetroConfig` are the entrance to the model; importing them needs neither TensorFlow nor ScaNN.
"""

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.model.retro import Retro

__all__ = ["Retro", "RetroConfig", "UserError"]
