"""RETRO and baseline of `make results`: the same decoder, with and without retrieval, on the same tokens.

    python launch/train.py --config=experiments/results.py --workdir=results/retro
    python launch/train.py --config=experiments/results.py:small-baseline --workdir=results/baseline

Hardware: `small` is for two CPU cores, `large` for one GPU; `trial` only shows that everything runs. launch/results.py
makes the data first. A step of `small` is 53 GFLOP of the baseline and 100 of the RETRO: about an hour for both is
reckoned with, not measured.
"""

import ml_collections

from retro_jax.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RetroConfig,
    TrainConfig,
    did_you_mean,
    to_config_dict,
)
from retro_jax.errors import UserError

SIZES = {
    "small": {
        "model": {
            "vocab_size": 4096,
            "width": 128,
            "num_layers": 4,
            "num_heads": 4,
            "head_size": 32,
            "ffw_width": 512,
            "cca_layers": (2, 4),
            "encoder_width": 128,
            "encoder_layers": 1,
            "encoder_num_heads": 4,
            "encoder_head_size": 32,
            "encoder_ffw_width": 512,
            "init_scale": 0.05,
            "share_embeddings": True,
        },
        "steps": 1800,
        "batch_size": 8,
        "learning_rate": 3e-3,
    },
    "trial": {
        "model": {
            "vocab_size": 1024,
            "width": 32,
            "num_layers": 2,
            "num_heads": 2,
            "head_size": 16,
            "ffw_width": 64,
            "cca_layers": (1, 2),
            "encoder_width": 32,
            "encoder_layers": 1,
            "encoder_num_heads": 2,
            "encoder_head_size": 16,
            "encoder_ffw_width": 64,
            "share_embeddings": True,
        },
        "steps": 60,
        "batch_size": 4,
        "learning_rate": 1e-2,
    },
    "large": {
        "model": {
            "vocab_size": 16_384,
            "width": 512,
            "num_layers": 8,
            "num_heads": 8,
            "head_size": 64,
            "ffw_width": 2048,
            "cca_layers": (2, 5, 8),
            "encoder_width": 512,
            "encoder_layers": 2,
            "encoder_num_heads": 8,
            "encoder_head_size": 64,
            "encoder_ffw_width": 2048,
            "share_embeddings": True,
            "dtype": "bfloat16",
        },
        "steps": 4000,
        "batch_size": 64,
        "learning_rate": 1e-3,
    },
}


def get_config(name: str = "small") -> ml_collections.ConfigDict:
    """`name`: one of SIZES, or with "-baseline" its decoder without encoder and chunked cross-attention."""
    size = name.removesuffix("-baseline")
    if size not in SIZES:
        raise UserError(f"size {size!r} is unknown{did_you_mean(size, SIZES)}")
    settings = SIZES[size]
    quarter = settings["steps"] // 4
    model = RetroConfig.preset("tiny", **settings["model"])
    if name.endswith("-baseline"):
        model = RetroConfig.preset("tiny", **{**settings["model"], "cca_layers": ()})
    return to_config_dict(
        TrainConfig(
            model=model,
            data=DataConfig(sequences=("results/sequences",), neighbours=2),
            optimizer=OptimizerConfig(
                peak_learning_rate=settings["learning_rate"], warmup_steps=settings["steps"] // 20
            ),
            checkpoint=CheckpointConfig(every_steps=quarter, every_minutes=3, keep_every=quarter),
            steps=settings["steps"],
            batch_size=settings["batch_size"],
            log_every=20,
        )
    )
