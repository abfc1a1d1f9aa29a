"""The four models of the paper and their baselines, trained as in its appendix C.1.

    python launch/train.py --config=experiments/paper.py:172m --workdir=runs/172m --config.data.sequences=DIR
    python launch/train.py --config=experiments/paper.py:172m-baseline --workdir=... --config.data.sequences=DIR

DIR is the output of tools/write_sequences.py with --length=2048, --k=2 and a tokenizer of at most 128,000 tokens.
172m, 425m and 1.5b: 800,000 steps of 256 sequences at a peak learning rate of 2e-4; 7.5b: 200,000 steps of 1,024 at
1e-4; 419,430,400,000 tokens each. Expected (paper table 14, C4 bits per byte, baseline / OFF / ON): 172m 0.98 / 0.98 /
0.82, 425m 0.92 / 0.92 / 0.77, 1.5b 0.84 / 0.84 / 0.71, 7.5b 0.78 / 0.78 / 0.66, with a database of 1.75 T tokens.
Hardware: TPU or GPU. Blocks keep their projections and weighted means and compute the rest again. By the TPU compiler
(`python tools/plan_topology.py --quick --config=experiments/paper.py:7.5b --topology=v4:8x8x8`), memory of each chip's
30.75 GiB and seconds a step, all communication overlapped and none:

    size    pod        chips    memory          a step    whole run
    172m    v4:2x4x4      32    13.8 GiB    1.0 to 1.1 s    9.5 days
    425m    v4:2x4x4      32    25.7 GiB    0.9 to 1.0 s    8.2 days
    1.5b    v4:4x4x8     128    12.8 GiB    0.6 to 0.7 s    5.8 days
    7.5b    v4:8x8x8     512    27.0 GiB    2.0 to 2.3 s    4.5 days

The time is a roofline, so an optimist's; the run is taken at the lower bound. On other numbers of devices give
--config.mesh.data: 1 is always possible, and so is any divisor of their number that divides the batch.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, MeshConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict

TOKENS = 419_430_400_000


def get_config(preset: str = "172m") -> ml_collections.ConfigDict:
    size = preset.removesuffix("-baseline")
    large = size == "7.5b"
    batch_size = 1024 if large else 256
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset(preset, remat="query,key,value,relative,mixed"),
            mesh=MeshConfig(data=8, fsdp=-1),
            optimizer=OptimizerConfig(peak_learning_rate=1e-4 if large else 2e-4, warmup_steps=750),
            checkpoint=CheckpointConfig(every_steps=1000),
            steps=TOKENS // (2048 * batch_size),
            batch_size=batch_size,
            microbatches=2 if size == "172m" else 1,
            log_every=20,
        )
    )
