"""RETROfit of the baseline of `make demo`: 198,080 of 551,552 parameters are trained, those of encoder and CCA.

    python launch/train.py --config=experiments/retrofit_demo.py --workdir=demo/retrofit
    python launch/train.py --config=experiments/retrofit_demo.py --workdir=demo/open --config.unfreeze_decoder=True

Hardware: 2 CPU cores, as the demo. The decoder stays that of demo/baseline, so RETRO[OFF] is that baseline bit for bit;
RETRO[ON] begins as it, too. Data, steps and learning rate are those of experiments/demo.py. The curve beside a RETRO
from scratch and the baseline:

    python launch/retrofit_curve.py --demo=demo --workdir=retrofit-curve

What training the added parameters alone saves: `python tools/benchmark.py retrofit --preset=demo --length=256`.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset("demo"),
            init_from="demo/baseline",
            data=DataConfig(sequences=("demo/sequences",), neighbours=1),
            optimizer=OptimizerConfig(peak_learning_rate=1.2e-2, warmup_steps=50),
            checkpoint=CheckpointConfig(every_steps=100),
            steps=400,
            batch_size=8,
            log_every=5,
        )
    )
