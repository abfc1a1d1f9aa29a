"""The peer `retro-pytorch`: an environment of its own for it, and its model in our shapes."""

import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks import environments
from retro_jax.config import TrainConfig
from retro_jax.errors import UserError

MODULE = "benchmarks.retro_pytorch_step"
HOME = environments.CACHE / "retro-pytorch"
# What the compiler makes is kept, so that only the first of several rounds waits for it.
ENVIRONMENT = {"TORCHINDUCTOR_CACHE_DIR": str(environments.CACHE / "inductor")}

TORCH = "torch==2.13.0+cpu"
# Without dependencies: retro-pytorch's end in an ImportError, and those of torch are gigabytes for GPUs.
PACKAGES = (
    "retro-pytorch==0.3.9",
    "einops==0.8.2",
    "numpy==2.4.6",
    "typing-extensions==4.16.0",
    "sympy==1.14.0",
    "mpmath==1.3.0",
    "networkx==3.6.1",
    "jinja2==3.1.6",
    "markupsafe==3.0.4",
    "fsspec==2026.9.0",
    "filelock==4.2.11",
)
IMPORTS = "import torch, einops, numpy, importlib.util as u, sys; sys.exit(not u.find_spec('retro_pytorch'))"


def environment(python: str | None, torch: str = TORCH, home: Path = HOME) -> str:
    """The interpreter that has retro-pytorch and, as its torch, `torch`; as of `environments.environment`."""
    needs = (
        f"{torch} from a package index with CPU builds (pip's extra-index-url, or --peer_torch for another "
        "version), or --peer_python, an interpreter that has torch, einops and retro-pytorch"
    )
    return environments.environment("retro-pytorch", python, home, (torch, *PACKAGES), IMPORTS, needs)


def job(config: TrainConfig, *, compiled: bool) -> dict[str, Any]:
    """What `retro_pytorch_step` is asked for, so that its shapes are those of our model.

    Raises:
      UserError: the peer has no such model.
    """
    model = config.model
    if model.head_size != model.encoder_head_size:
        raise UserError(
            f"the peer has one head size for decoder and encoder, this model has {model.head_size} and "
            f"{model.encoder_head_size}; take another --shape or --preset"
        )
    if model.dtype not in ("float32", "bfloat16"):
        raise UserError(f"the peer is measured in float32 and bfloat16, not in {model.dtype}")
    return {
        "compile": compiled,
        "dtype": model.dtype,
        "vocab_size": model.vocab_size,
        "length": config.data.length,
        "batch_size": config.batch_size,
        "k": config.data.neighbours,
        "chunk_length": model.chunk_length,
        "neighbour_length": model.neighbour_length,
        "width": model.width,
        "num_layers": model.num_layers,
        "heads": model.num_heads,
        "head_size": model.head_size,
        "ffw_factor": model.ffw_width / model.width,
        "cca_layers": list(model.cca_layers),
        "encoder_width": model.encoder_width,
        "encoder_layers": model.encoder_layers,
        "encoder_ca_layers": list(model.encoder_ca_layers),
        "encoder_heads": model.encoder_num_heads,
        "encoder_ffw_factor": model.encoder_ffw_width / model.encoder_width,
    }


def compiler_missing() -> str | None:
    """Why torch.compile cannot run here; None when it can."""
    if any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return None
    return "torch.compile needs a C++ compiler (g++), and none is on the PATH"
