"""The four models of the paper and their baselines, trained as in its appendix C.1.

    python launch/train.py --config=experiments/paper.py:172m --workdir=runs/172m --config.data.sequences=DIR
    python launch/train.py --config=experiments/paper.py:172m-baseline --workdir=... --config.data.sequences=DIR

DIR is the output of tools/write_sequences.py with --length=2048, --k=2 and a tokenizer of at most 128,000 tokens.
172m, 425m and 1.5b: 800,000 steps of 256 sequences at a peak learning rate of 2e-4; 7.5b: 200,000 steps of 1,024 at
1e-4; 419,430,400,000 tokens each. Expected (paper table 14, C4 bits per byte, baseline / OFF / ON): 172m 0.98 / 0.98 /
0.82, 425m 0.92 / 0.92 / 0.77, 1.5b 0.84 / 0.84 / 0.71, 7.5b 0.78 / 0.78 / 0.66, with a database of 1.75 T tokens.
Hardware: TPU or GPU. Blocks keep their queries, keys, values and weighted means and compute the rest again. By the TPU
compiler 425m fits on v4:2x4x4, 1.5b on v4:4x4x8 and 7.5b on v4:8x8x8 (28.6 of 30.75 GiB a chip), each with
--config.mesh.data=8; `tools/plan_topology.py` tells about others.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict

TOKENS = 419_430_400_000


def get_config(preset: str = "172m") -> ml_collections.ConfigDict:
    large = preset.startswith("7.5b")
    batch_size = 1024 if large else 256
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset(preset, remat="query,key,value,mixed"),
            optimizer=OptimizerConfig(peak_learning_rate=1e-4 if large else 2e-4, warmup_steps=750),
            checkpoint=CheckpointConfig(every_steps=1000),
            steps=TOKENS // (2048 * batch_size),
            batch_size=batch_size,
            log_every=20,
        )
    )
