"""RETRO and baseline of `make demo`: 353,472 (baseline) and 551,552 (RETRO) parameters on 433 kB of text.

    python launch/train.py --config=experiments/demo.py --workdir=demo/retro
    python launch/train.py --config=experiments/demo.py:demo-baseline --workdir=demo/baseline

Hardware: 2 CPU cores. The README shows what comes out and how long it takes.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """`preset` names the architecture: "demo", or "demo-baseline" for its decoder without encoder and CCA."""
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset(preset),
            data=DataConfig(sequences=("demo/sequences",), neighbours=1),
            optimizer=OptimizerConfig(peak_learning_rate=1.2e-2, warmup_steps=50),
            checkpoint=CheckpointConfig(every_steps=100),
            steps=400,
            batch_size=8,
            log_every=5,
        )
    )
