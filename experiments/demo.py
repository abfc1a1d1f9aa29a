"""RETRO and baseline of `make demo`: two million parameters on a few hundred kilobytes of text.

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
            data=DataConfig(sequences=("demo/sequences",), neighbours=2),
            optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=20),
            checkpoint=CheckpointConfig(every_steps=100),
            steps=300,
            batch_size=8,
            log_every=5,
        )
    )
