"""retro_jax: the retrieval-enhanced transformer RETRO in JAX and Flax.

`Retro` and `RetroConfig` are the entrance to the model, `load_pretrained` to trained ones; importing them needs
neither TensorFlow nor ScaNN. They are loaded when they are first asked for, so that a tool which needs no JAX starts
without it.
"""

import importlib

_HOMES = {
    "Retro": "retro_jax.model.retro",
    "RetroConfig": "retro_jax.config",
    "UserError": "retro_jax.errors",
    "load_pretrained": "retro_jax.interop.pretrained",
}

__all__ = ["Retro", "RetroConfig", "UserError", "load_pretrained"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'retro_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
