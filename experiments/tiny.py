"""The preset "tiny" on a corpus of your own: a RETRO that trains on a laptop.

    python launch/train.py --config=experiments/tiny.py --workdir=runs/tiny --config.data.sequences=DIR
    python launch/train.py --config=experiments/tiny.py:tiny-baseline --workdir=... --config.data.sequences=DIR

DIR is the output of tools/write_sequences.py with --length=512 and a tokenizer of at most 8,192 tokens.
Hardware: any CPU or one GPU. On two CPU cores a step of batch 4 took 2.1 s and 2.4 GiB; the batch here is 8, so two
to three hours. The baseline takes a third of the time.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset(preset),
            optimizer=OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=100),
            checkpoint=CheckpointConfig(every_steps=200),
            steps=2000,
            batch_size=8,
        )
    )
