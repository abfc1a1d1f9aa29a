"""A RETRO that learns to look facts up: people who do not exist, and a register of them (tools/make_planted_text.py).

    python launch/train.py --config=experiments/planted.py --workdir=planted/retro

Hardware: 2 CPU cores.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """`preset`: "demo", or "demo-baseline" for the same decoder without retrieval."""
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset(
                preset,
                vocab_size=1024,
                num_layers=2,
                cca_layers=() if preset.endswith("-baseline") else (1, 2),
                chunk_length=32,
                neighbour_length=64,
            ),
            data=DataConfig(sequences=("planted/sequences",), neighbours=1),
            optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=20),
            checkpoint=CheckpointConfig(every_steps=100),
            steps=300,
            batch_size=32,
            log_every=20,
        )
    )
